"""Matplotlib figures for a paper: paths, frontiers, and the places of the zeros in a network.

Every function returns a `matplotlib.figure.Figure`: `figure.savefig("path.pdf")` writes it, and a notebook displays it.
No function uses pyplot, so nothing is global: figures need no display and no closing, and several threads may draw at
the same time. Pass `figure=page.subfigures(1, 2)[0]` to draw into a part of your own page. Fonts follow
`matplotlib.rcParams`. Series differ in line style and marker as well as in colour (Okabe and Ito, 2008), so that a
colour-blind reader and a grey-scale print can tell them apart.
"""

from torchreg.views.plots.curves import frontier, regularization_path
from torchreg.views.plots.layers import sparsity_over_time
from torchreg.views.plots.weights import input_map, masks, weight_histogram

__all__ = ["frontier", "input_map", "masks", "regularization_path", "sparsity_over_time", "weight_histogram"]
