"""Reading nnU-Net v2's plans.json into a plan of ours. No class or function that it names is ever imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.pipeline.presets import figures_of
from rfmedsam2.records.base import Record
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.plan import Augmentation, Normalisation, Plan, Resampling, SegmentationLoss, Stage, UNetConfig
from rfmedsam2.store.files import read_record

LOGGER = logging.getLogger(__name__)
NORMALISATIONS = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "rescale_0_1",
    "RGBTo01Normalization": "rgb_0_1",
    "NoNormalization": "none",
}
BLOCKS = {"PlainConvUNet": ("plain", "n_conv_per_stage"), "ResidualEncoderUNet": ("residual", "n_blocks_per_stage")}
NETWORK_DEFAULTS: dict[str, tuple[object, ...]] = {
    "conv_bias": (True,),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "dropout_op": (None,),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_kwargs": ({"inplace": True}, {}, None),
    "nonlin_first": (False, None),
    "bottleneck_channels": (None,),
    "stem_channels": (None,),
    "deep_supervision": (True, False, None),
}
"""Arguments of the network that have one meaning here: any other value is unsupported."""
READ_ELSEWHERE = {
    "n_stages",
    "features_per_stage",
    "conv_op",
    "norm_op",
    "kernel_sizes",
    "strides",
    "n_conv_per_stage",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "dropout_op_kwargs",
}
RESAMPLING = "resample_data_or_seg_to_shape"
PREPROCESSORS = {"DefaultPreprocessor"}
NEVER_SEPARATE = 1e6
"""An anisotropy threshold that no image reaches: nnU-Net's force_separate_z = False."""


class _NnunetPlans(Record):
    """The parts of plans.json that matter; nnU-Net writes more."""

    model_config = {**Record.model_config, "extra": "ignore"}

    dataset_name: str
    plans_name: str
    original_median_spacing_after_transp: tuple[float, float, float]
    original_median_shape_after_transp: tuple[int, int, int]
    image_reader_writer: str = ""
    transpose_forward: tuple[int, int, int]
    label_manager: str = "LabelManager"
    configurations: dict[str, dict[str, Any]]
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]


def import_nnunet_plans(
    path: Path,
    dataset: DatasetJson,
    *,
    fingerprint: str = "",
    name: str | None = None,
    stages: Sequence[str] | None = None,
) -> Plan:
    """Read nnU-Net's plans.json.

    Args:
        path: nnUNetPlans.json or any other plans file of nnU-Net v2.
        dataset: the dataset.json beside it (channels, labels, file ending are not in the plans).
        fingerprint: digest of this package's fingerprint of the dataset, if there is one.
        name: of the plan; None: nnU-Net's plans_name.
        stages: configurations to take; None: all but those of a cascade's second step.

    Returns:
        A plan with nnU-Net's training figures.

    Raises:
        RecordError: missing, not JSON or not such a file.
        UsageError: a configuration of `stages` does not exist.
        PlanError: something that this package does not have; lists all of it.
    """
    source = read_record(path, _NnunetPlans)
    resolved = {stage: _resolved(source.configurations, stage, path) for stage in source.configurations}
    unknown = [stage for stage in stages or () if stage not in resolved]
    if unknown:
        raise UsageError("No such configuration", where=", ".join(unknown), expected=f"one of {', '.join(resolved)}")
    cascaded = [stage for stage, configuration in resolved.items() if configuration.get("previous_stage")]
    if stages is None and cascaded:
        LOGGER.warning("Left out of %s: %s (cascades are not supported)", path.name, ", ".join(cascaded))
    wanted = [stage for stage in resolved if stage not in cascaded] if stages is None else list(stages)
    faults = [f"{stage}: {fault}" for stage in wanted for fault in _unsupported(resolved[stage])]
    if source.label_manager != "LabelManager":
        faults.append(f"label_manager {source.label_manager}")
    if faults:
        raise PlanError(
            f"nnU-Net's plans hold what this package does not have ({'; '.join(faults)})",
            where=path,
            remedy="Import other configurations, or plan anew with --preset nnunet",
        )
    channels = range(len(dataset.channels))
    return Plan.parse(
        {
            "name": name or source.plans_name,
            "dataset": source.dataset_name,
            "fingerprint": fingerprint,
            "channels": dataset.channels,
            "labels": dataset.label_set,
            "file_ending": dataset.file_ending,
            "reorient": "RAS" if source.image_reader_writer.endswith("WithReorient") else None,
            "transpose_forward": source.transpose_forward,
            "intensities": [_intensities(source, channel, path) for channel in channels],
            "stages": {stage: _stage(resolved[stage], source, f"{path}, {stage}") for stage in wanted},
        },
        where=path,
    )


def _resolved(configurations: Mapping[str, dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    """A configuration with everything that it inherits."""
    chain, parent = [], name
    while parent is not None:
        if parent in chain or parent not in configurations:
            raise PlanError(
                "A configuration inherits from itself" if parent in chain else "A configuration inherits from nothing",
                where=f"{path}, {name}",
                found=" -> ".join([*chain, parent]),
            )
        chain.append(parent)
        parent = configurations[parent].get("inherits_from")
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(configurations[ancestor])
    return _modernised(merged)


def _modernised(configuration: dict[str, Any]) -> dict[str, Any]:
    """Plans of nnU-Net before 2.3 describe the network by other keys."""
    if "architecture" in configuration or "UNet_class_name" not in configuration:
        return configuration
    old, stages = configuration, len(configuration["n_conv_per_stage_encoder"])
    _, blocks_key = BLOCKS.get(old["UNet_class_name"], ("", "n_conv_per_stage"))
    widths = (old["UNet_base_num_features"] * 2**i for i in range(stages))
    arguments = {
        "features_per_stage": [min(width, old["unet_max_num_features"]) for width in widths],
        "kernel_sizes": old["conv_kernel_sizes"],
        "strides": old["pool_op_kernel_sizes"],
        blocks_key: old["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": old["n_conv_per_stage_decoder"],
    }
    return {**old, "architecture": {"network_class_name": old["UNet_class_name"], "arch_kwargs": arguments}}


def _unsupported(configuration: Mapping[str, Any]) -> list[str]:
    """What of a configuration cannot be had here, in words."""
    faults = []
    if configuration.get("previous_stage"):
        faults.append("the second step of a cascade")
    if configuration.get("preprocessor_name", "DefaultPreprocessor") not in PREPROCESSORS:
        faults.append(f"preprocessor {configuration['preprocessor_name']}")
    for scheme in configuration.get("normalization_schemes", ()):
        if scheme not in NORMALISATIONS:
            faults.append(f"normalisation {scheme}")
    for kind in ("data", "seg", "probabilities"):
        function = configuration.get(f"resampling_fn_{kind}", RESAMPLING)
        if function != RESAMPLING:
            faults.append(f"resampling function {function}")
        elif (configuration.get(f"resampling_fn_{kind}_kwargs") or {}).get("force_separate_z"):
            faults.append("force_separate_z")
    architecture = configuration.get("architecture") or {}
    network = str(architecture.get("network_class_name", "none")).rsplit(".", 1)[-1]
    if network not in BLOCKS:
        return [*faults, f"network {network}"]
    arguments = architecture.get("arch_kwargs") or {}
    for key, value in arguments.items():
        if key in NETWORK_DEFAULTS and value not in NETWORK_DEFAULTS[key]:
            faults.append(f"network argument {key} = {value!r}")
        if key not in NETWORK_DEFAULTS and key not in READ_ELSEWHERE:
            faults.append(f"network argument {key}")
    dimensions = len(configuration["patch_size"])
    for key, stem in (("conv_op", "Conv"), ("norm_op", "InstanceNorm")):
        value = str(arguments.get(key, f"{stem}{dimensions}d"))
        if value.rsplit(".", 1)[-1] != f"{stem}{dimensions}d":
            faults.append(f"network argument {key} = {value!r}")
    return faults


def _stage(configuration: Mapping[str, Any], source: _NnunetPlans, where: str) -> Stage:
    patch = configuration["patch_size"]
    spacing, shape = list(configuration["spacing"]), list(configuration["median_image_size_in_voxels"])
    if len(patch) == 2:
        # a 2D stage leaves slices where they are: describe the first axis by the median case
        spacing = [source.original_median_spacing_after_transp[0], *spacing[-2:]]
        shape = [source.original_median_shape_after_transp[0], *shape[-2:]]
    schemes = zip(configuration["normalization_schemes"], configuration["use_mask_for_norm"], strict=True)
    nnunet = figures_of("nnunet")
    return Stage.parse(
        {
            "spacing_mm": spacing,
            "median_shape": [round(n) for n in shape],
            "patch_size": patch,
            "batch_size": configuration["batch_size"],
            "normalisation": [
                Normalisation.parse({"kind": NORMALISATIONS[scheme], "use_mask": bool(mask)})
                for scheme, mask in schemes
            ],
            "resampling": _resampling(configuration),
            "augmentation": Augmentation(mirror_axes=tuple(range(len(patch)))),
            "model": _network(configuration["architecture"], len(patch), where),
            "loss": SegmentationLoss(batch_dice=bool(configuration.get("batch_dice", True))),
            "train": nnunet.train,
            "inference": nnunet.inference,
        },
        where=where,
    )


def _resampling(configuration: Mapping[str, Any]) -> Resampling:
    image, label, logits = (
        configuration.get(f"resampling_fn_{kind}_kwargs") or {} for kind in ("data", "seg", "probabilities")
    )
    return Resampling.parse(
        {
            "order_image": image.get("order", 3),
            "order_label": label.get("order", 1),
            "order_logits": logits.get("order", 1),
            "order_z": image.get("order_z", 0),
            "anisotropy_threshold": NEVER_SEPARATE if image.get("force_separate_z") is False else 3.0,
        }
    )


def _network(architecture: Mapping[str, Any], dimensions: int, where: str) -> UNetConfig:
    block, blocks_key = BLOCKS[architecture["network_class_name"].rsplit(".", 1)[-1]]
    arguments = architecture["arch_kwargs"]
    features = arguments["features_per_stage"]
    stages = len(features) if isinstance(features, list | tuple) else arguments["n_stages"]

    def per_stage(value: Any, count: int) -> list[Any]:
        """The library takes one number for all stages, too."""
        return list(value) if isinstance(value, list | tuple) else [value] * count

    def per_axis(value: Any) -> list[list[int]]:
        return [per_stage(entry, dimensions) for entry in per_stage(value, stages)]

    return UNetConfig.parse(
        {
            "block": block,
            "features": per_stage(features, stages),
            "kernel_sizes": per_axis(arguments["kernel_sizes"]),
            "strides": per_axis(arguments["strides"]),
            "encoder_blocks": per_stage(arguments[blocks_key], stages),
            "decoder_blocks": per_stage(arguments["n_conv_per_stage_decoder"], stages - 1),
        },
        where=where,
    )


def _intensities(source: _NnunetPlans, channel: int, path: Path) -> IntensityStatistics:
    where = f"{path}, foreground_intensity_properties_per_channel, {channel}"
    return IntensityStatistics.parse(
        source.foreground_intensity_properties_per_channel.get(str(channel), {}), where=where
    )
