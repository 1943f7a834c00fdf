"""TensorBoard's records: scalars, images, histograms, text, hyperparameters and the layout, as `Summary.Value`s."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BINS = 64
SAMPLE = 100_000  # a histogram of more entries is that of an evenly spread sample of this size, scaled up

Hyperparameter = bool | int | float | str


def event(step: int, values: Sequence[Any]) -> Any:
    """An `Event` of several values, with the present time."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(step=step, wall_time=time.time(), summary=Summary(value=values))


def restart(step: int) -> Any:
    """An `Event` that declares the records of `step` and of later steps void."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(step=step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))


def scalars(tags: Sequence[str]) -> Any:
    """An `Event` with a scalar for each tag, which is filled in again and again."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return event(0, [Summary.Value(tag=tag, simple_value=0.0) for tag in tags])


def image(tag: str, pixels: Tensor, side: int = 224) -> Any:
    """An image from (height, width) in [0, 1], where 0 is black, or from (height, width, 3) bytes.

    It is enlarged to about `side` pixels, and made thicker if it is thinner than 1 : 3.
    """
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    grey = pixels.dim() == 2
    pixels = pixels.cpu()
    pixels = (pixels * 255).round().to(torch.uint8) if grey else pixels
    longest = max(pixels.shape[:2])
    times = max(1, side // longest)
    # Enlarged here by repetition: browsers would enlarge a small image, each in a different way.
    for axis, length in enumerate(pixels.shape[:2]):
        pixels = pixels.repeat_interleave(max(times, longest * times // (3 * length)), axis)
    png = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(png, format="PNG")
    height, width = pixels.shape[:2]
    encoded = Summary.Image(
        height=height, width=width, colorspace=1 if grey else 3, encoded_image_string=png.getvalue()
    )
    return Summary.Value(tag=tag, image=encoded)


def figure(tag: str, source: Any) -> Any:
    """An image of a Matplotlib figure."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    png = io.BytesIO()
    source.savefig(png, format="png", dpi=min(100, 600 / max(source.get_size_inches())))
    width, height = Image.open(io.BytesIO(png.getvalue())).size
    return Summary.Value(
        tag=tag,
        image=Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png.getvalue()),
    )


def histogram(tag: str, w: Tensor) -> Any | None:
    """A histogram of the finite nonzero entries, complex ones by their modulus; None without such entries."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    flat = (w.abs() if w.is_complex() else w).reshape(-1)
    alive = flat[flat.isfinite() & (flat != 0)]
    sample = alive[:: -(-len(alive) // SAMPLE) or 1].cpu().double()
    if not len(sample):
        return None
    low, high = sample.min().item(), sample.max().item()
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2
    scale = len(alive) / len(sample)
    counts = torch.histc(sample, BINS, low, high) * scale
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64, device="cpu")
    return Summary.Value(
        tag=tag,
        histo=HistogramProto(
            min=low,
            max=high,
            num=len(alive),
            sum=sample.sum().item() * scale,
            sum_squares=sample.square().sum().item() * scale,
            # A bucket has an upper limit alone, so an empty first bucket gives the lower limit of the second one.
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        ),
    )


def text(tag: str, markdown: str) -> Any:
    """A text in Markdown."""
    return _string(f"{tag}/text_summary", markdown.encode(), "text")


def layout(charts: Any) -> Any:
    """The custom-scalar page, from a `Layout`."""
    return _string("custom_scalars__config__", charts.SerializeToString(), "custom_scalars")


def hyperparameters(run: str, values: Mapping[str, Hyperparameter], metrics: Mapping[str, str]) -> list[Any]:
    """The hyperparameters `values` of a run, and the scalars `metrics` by their titles, for the hyperparameter page.

    They are part of the run itself, whereas `SummaryWriter.add_hparams` makes a separate run for them.
    """
    from tensorboard.plugins.hparams import summary_v2 as hp

    config = hp.hparams_config_pb(
        hparams=[hp.HParam(name, display_name=name) for name in values],
        metrics=[hp.Metric(tag, display_name=title) for tag, title in metrics.items()],
    )
    # Each run is a separate trial, even if only the seed differs. Its name comes first, since the table cuts it short.
    folder, name = os.path.split(run)
    start = hp.hparams_pb(dict(values), trial_id=f"{name} in {folder}" if name and folder else run)
    return [*config.value, *start.value]


def end(failed: bool) -> Any:
    """The end of a run, with or without an error."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info)),
        tensor=metadata.NULL_TENSOR,
    )


def _string(tag: str, content: bytes, plugin: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin)),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto()),
    )
