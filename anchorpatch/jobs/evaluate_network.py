"""Evaluate an ordinary network on shards of patches: Tables 3 and 4.

Shards -> network -> softmax -> sum over an image's patches -> accuracy, beside the same network
on whole images, with the cost of both.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor
from torchvision.transforms import v2

from anchorpatch.errors import DataError, WeightsError
from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.evaluation.config import EvaluateNetworkConfig
from anchorpatch.jobs.evaluation.parts import Evaluation
from anchorpatch.jobs.evaluation.predictions import Predictions, check_predictions_path
from anchorpatch.jobs.evaluation.tables import WHOLE, Table3, Table4, table_3_rows, table_4_rows
from anchorpatch.runtime.device import computing_on
from anchorpatch.runtime.progress import Reporter

__all__ = ["EvaluateNetworkConfig", "run", "run_rescale"]


def run(config: EvaluateNetworkConfig, progress: Reporter | None = None) -> Table3:
    """Evaluate a network on patches and on whole images (Table 3).

    Raises:
        ShardError: there are no shards, no images in them, or an image has no patch.
        CorruptShard: a shard cannot be read.
        DataError: the shards have other classes than the weights.
        WeightsError: weights are missing, or another network's.
        SettingsError: no such network, or it cannot take a patch.
        StorageError: the predictions cannot be written.
    """
    if config.predictions is not None:
        check_predictions_path(config.predictions)
    with Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        anchornet, no_speed = job.find_anchornet(whole, why_not)
        networks = job.for_patches()
        distinct = list({id(network): network for network in networks.values()}.values())
        asked = None
        if whole is not None and config.whole:
            try:
                asked = job.for_whole_images(distinct[0] if len(distinct) == 1 else None)
            except WeightsError as error:
                if len(distinct) == 1 or config.whole_weights is not None:
                    raise
                why_not = str(error)  # networks of one scale have no say in whole images
        job.report.message(computing_on(job.device))
        costs = job.costs(distinct[0].module)
        figures = job.score_whole(asked, whole) if asked and whole else None
        predictions = None
        if config.predictions is not None:
            predictions = Predictions(config.predictions, job.reader, job.device)
        patches = job.score_patches(networks, keep=predictions.keep if predictions else None)
        if predictions is not None:
            predictions.write(job.world)
        speed = job.measure(networks, whole, anchornet) if anchornet and whole else None
        missing = {"row 224": why_not if config.whole else None, "speed": no_speed}
        one = distinct[0].source if len(distinct) == 1 else None
        by_scale = ", ".join(f"{net.source} ({scale} px)" for scale, net in networks.items())
        whole_weights = asked.source if asked else None
        weights = {str(scale): network.source for scale, network in networks.items()}
        weights_of_rows = {**weights, str(WHOLE): whole_weights, "all": one}
        return Table3(
            network=config.network,
            shards=str(job.reader.folder),
            weights=one or by_scale,
            whole_weights=whole_weights,
            whole_source=whole.description if whole and asked else None,
            gmacs_whole=costs.network[WHOLE],
            gmacs_anchornet=costs.anchornet,
            rows=tuple(
                replace(row, weights=weights_of_rows[row.scale])
                for row in table_3_rows(patches, figures, costs)
            ),
            speed=speed,
            left_out=tuple(f"{what}: {why}" for what, why in missing.items() if why),
            whole_trained_on=asked.trained_on if asked else "",
        )


def run_rescale(config: EvaluateNetworkConfig, progress: Reporter | None = None) -> Table4:
    """Compare the strongest patch of each image with the image rescaled to its size (Table 4).

    Both are shown to the network for whole images: the paper does not train it further.

    Raises:
        DataError: there are no whole images, or the shards have other classes than the weights.
        AnchorpatchError: as `run`.
    """
    with Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        if whole is None:
            raise DataError(f"rescaling needs the whole images, but {why_not}")
        network = job.for_whole_images()
        job.report.message(computing_on(job.device))
        rescaled = {
            scale: job.score_whole(network, whole, (scale,), partial(_rescaled, side=scale))
            for scale in config.scales
        }
        localized = job.score_patches(dict.fromkeys(config.scales, network), most=1)
        return Table4(
            network=config.network,
            shards=str(job.reader.folder),
            weights=network.source,
            whole_source=whole.description,
            rows=table_4_rows(rescaled, localized),
            trained_on=network.trained_on,
        )


def _rescaled(batch: Crops, side: int) -> Crops:
    """Make whole images as small as a patch: antialiased bilinear."""
    pixels: Tensor = v2.functional.resize(
        batch.pixels.permute(0, 3, 1, 2), [side, side], antialias=True
    )
    return batch._replace(pixels=pixels.permute(0, 2, 3, 1))
