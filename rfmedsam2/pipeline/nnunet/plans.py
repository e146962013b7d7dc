"""Importing nnU-Net v2's plans.json. Classes and functions named in it are never imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from rfmedsam2.arguments import option
from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.records.base import Record
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Augmentation, Plan, SegmentationLoss, Stage
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.system.atomic import read_record

NNUNET_TRAIN = TrainConfig(learning_rate=1e-2)
"""Training settings of nnUNetTrainer, which are not in its plans."""
NORMALIZATIONS = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "rescale_0_1",
    "RGBTo01Normalization": "rgb_0_1",
    "NoNormalization": "none",
}
BLOCKS = {"PlainConvUNet": ("plain", "n_conv_per_stage"), "ResidualEncoderUNet": ("residual", "n_blocks_per_stage")}
NORMS = {"instance": "InstanceNorm", "batch": "BatchNorm"}
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
"""Network arguments for which only this value is supported."""
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
"""An anisotropy threshold larger than any image's: nnU-Net's force_separate_z = False."""


class _Loose(Record):
    """Base for nnU-Net's records, which have more fields than we use."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


PerStage = int | tuple[int, ...]
PerAxis = int | tuple[int | tuple[int, ...], ...]


class _Arguments(_Loose):
    n_stages: int | None = None
    features_per_stage: PerStage
    kernel_sizes: PerAxis
    strides: PerAxis
    n_conv_per_stage: PerStage | None = None
    n_blocks_per_stage: PerStage | None = None
    n_conv_per_stage_decoder: PerStage


class _Architecture(_Loose):
    network_class_name: str
    arch_kwargs: dict[str, Any]


class _OldArchitecture(_Loose):
    """Network fields of plans before nnU-Net 2.3, which are part of the configuration."""

    UNet_class_name: str
    UNet_base_num_features: int
    unet_max_num_features: int
    n_conv_per_stage_encoder: tuple[int, ...]
    n_conv_per_stage_decoder: tuple[int, ...]
    conv_kernel_sizes: PerAxis
    pool_op_kernel_sizes: PerAxis


class _Configuration(_Loose):
    patch_size: Annotated[tuple[int, ...], Field(min_length=2, max_length=3)]
    spacing: Annotated[tuple[float, ...], Field(min_length=2, max_length=3)]
    median_image_size_in_voxels: Annotated[tuple[float, ...], Field(min_length=2, max_length=3)]
    batch_size: int
    batch_dice: bool = True
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    preprocessor_name: str = "DefaultPreprocessor"
    previous_stage: str | None = None
    resampling_fn_data: str = RESAMPLING
    resampling_fn_seg: str = RESAMPLING
    resampling_fn_probabilities: str = RESAMPLING
    resampling_fn_data_kwargs: dict[str, Any] = Field(default_factory=dict)
    resampling_fn_seg_kwargs: dict[str, Any] = Field(default_factory=dict)
    resampling_fn_probabilities_kwargs: dict[str, Any] = Field(default_factory=dict)
    architecture: _Architecture

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if len(self.normalization_schemes) != len(self.use_mask_for_norm):
            raise ValueError("normalization_schemes and use_mask_for_norm must have one entry per channel")
        if not len(self.patch_size) == len(self.spacing) == len(self.median_image_size_in_voxels):
            raise ValueError("patch_size, spacing and median_image_size_in_voxels must have as many axes")
        return self


class _NnunetPlans(_Loose):
    known_as: ClassVar[str] = "nnUNetPlans.json"

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
        dataset: the dataset.json beside it (plans do not contain channels, labels and file ending).
        fingerprint: digest of this package's fingerprint of the dataset, if there is one.
        name: name of the plan; None: rfmed_ and nnU-Net's plans_name (plans_name is taken by nnU-Net's files).
        stages: configurations to import; None: all.

    Returns:
        A plan with nnU-Net's training settings.

    Raises:
        RecordError: the file is missing, not JSON or not a plans file.
        UsageError: a configuration of `stages` does not exist.
        PlanError: the plans use features that this package does not support; lists all of them.
    """
    source = read_record(path, _NnunetPlans)
    resolved = {stage: _resolved(source.configurations, stage, path) for stage in source.configurations}
    unknown = [stage for stage in stages or () if stage not in resolved]
    if unknown:
        raise UsageError(
            "The configuration does not exist",
            where=path,
            expected=f"one or several of {', '.join(resolved)}",
            found=", ".join(unknown),
        )
    wanted = list(resolved if stages is None else stages)
    parsed = {stage: _Configuration.parse(resolved[stage], where=f"{path}, {stage}") for stage in wanted}
    faults = [f"{stage}: {fault}" for stage in wanted for fault in _unsupported(parsed[stage])]
    if source.label_manager != "LabelManager":
        faults.append(f"label_manager {source.label_manager}")
    if faults:
        raise PlanError(
            f"nnU-Net's plans use unsupported features ({'; '.join(faults)})",
            where=path,
            remedy=f"Import other configurations, or plan again with {option('preset', 'nnunet')}",
        )
    channels = range(len(dataset.channels))
    return Plan.parse(
        {
            "name": name or f"rfmed_{source.plans_name}",
            "dataset": source.dataset_name,
            "fingerprint": fingerprint,
            "channels": dataset.channels,
            "labels": dataset.label_set,
            "file_ending": dataset.file_ending,
            "reorient": "RAS" if source.image_reader_writer.endswith("WithReorient") else None,
            "transpose_forward": source.transpose_forward,
            "intensities": [_intensities(source, channel, path) for channel in channels],
            "stages": {stage: _stage(parsed[stage], source, f"{path}, {stage}") for stage in wanted},
        },
        where=path,
    )


def _resolved(configurations: Mapping[str, dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    """Resolve a configuration with all inherited fields."""
    chain, parent = [], name
    while parent is not None:
        if parent in chain or parent not in configurations:
            raise PlanError(
                "A configuration inherits from itself"
                if parent in chain
                else "A configuration inherits from one that does not exist",
                where=f"{path}, {name}",
                found=" -> ".join([*chain, parent]),
            )
        chain.append(parent)
        parent = configurations[parent].get("inherits_from")
        parent = parent if parent is None else str(parent)
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(configurations[ancestor])
    return _upgraded(merged, f"{path}, {name}")


def _upgraded(plain: dict[str, Any], where: str) -> dict[str, Any]:
    if "architecture" in plain or "UNet_class_name" not in plain:
        return plain
    old = _OldArchitecture.parse(plain, where=where)
    _, blocks_key = BLOCKS.get(old.UNet_class_name, ("", "n_conv_per_stage"))
    widths = (old.UNet_base_num_features * 2**i for i in range(len(old.n_conv_per_stage_encoder)))
    arguments = {
        "features_per_stage": [min(width, old.unet_max_num_features) for width in widths],
        "kernel_sizes": old.conv_kernel_sizes,
        "strides": old.pool_op_kernel_sizes,
        blocks_key: old.n_conv_per_stage_encoder,
        "n_conv_per_stage_decoder": old.n_conv_per_stage_decoder,
    }
    return {**plain, "architecture": {"network_class_name": old.UNet_class_name, "arch_kwargs": arguments}}


def _resamplings(configuration: _Configuration) -> list[tuple[str, dict[str, Any]]]:
    """Resampling function and arguments of image, label and probabilities."""
    return [
        (configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs),
        (configuration.resampling_fn_seg, configuration.resampling_fn_seg_kwargs),
        (configuration.resampling_fn_probabilities, configuration.resampling_fn_probabilities_kwargs),
    ]


def _unsupported(configuration: _Configuration) -> list[str]:
    """List the unsupported features of a configuration."""
    faults = list[str]()
    if configuration.preprocessor_name not in PREPROCESSORS:
        faults.append(f"preprocessor {configuration.preprocessor_name}")
    faults += [f"normalization {s}" for s in configuration.normalization_schemes if s not in NORMALIZATIONS]
    for function, arguments in _resamplings(configuration):
        if function != RESAMPLING:
            faults.append(f"resampling function {function}")
        elif arguments.get("force_separate_z"):
            faults.append("force_separate_z")
    return faults + _unsupported_network(configuration.architecture, len(configuration.patch_size))


def _unsupported_network(architecture: _Architecture, dimensions: int) -> list[str]:
    network = architecture.network_class_name.rsplit(".", 1)[-1]
    if network not in BLOCKS:
        return [f"network {network}"]
    arguments, faults = architecture.arch_kwargs, []
    for key, value in arguments.items():
        if key in NETWORK_DEFAULTS and value not in NETWORK_DEFAULTS[key]:
            faults.append(f"network argument {key} = {value!r}")
        if key not in NETWORK_DEFAULTS and key not in READ_ELSEWHERE:
            faults.append(f"network argument {key}")
    for key, stems in (("conv_op", ("Conv",)), ("norm_op", tuple(NORMS.values()))):
        value = str(arguments.get(key, f"{stems[0]}{dimensions}d"))
        if value.rsplit(".", 1)[-1] not in [f"{stem}{dimensions}d" for stem in stems]:
            faults.append(f"network argument {key} = {value!r}")
    return faults


def _stage(configuration: _Configuration, source: _NnunetPlans, where: str) -> Stage:
    dimensions = len(configuration.patch_size)
    spacing, shape = configuration.spacing, configuration.median_image_size_in_voxels
    if dimensions == 2:
        # a 2D stage does not resample the first axis: describe it by the median case
        spacing = (source.original_median_spacing_after_transp[0], *spacing)
        shape = (source.original_median_shape_after_transp[0], *shape)
    schemes = zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    return Stage.parse(
        {
            "spacing_mm": spacing,
            "median_shape": [round(n) for n in shape],
            "patch_size": configuration.patch_size,
            "batch_size": configuration.batch_size,
            "normalization": [{"kind": NORMALIZATIONS[scheme], "use_mask": mask} for scheme, mask in schemes],
            "resampling": _resampling(configuration),
            "augmentation": Augmentation(mirror_axes=tuple(range(dimensions))),
            "model": _network(configuration.architecture, dimensions, where),
            "loss": SegmentationLoss(batch_dice=configuration.batch_dice),
            "train": NNUNET_TRAIN,
            "previous_stage": configuration.previous_stage,
        },
        where=where,
    )


def _resampling(configuration: _Configuration) -> dict[str, Any]:
    image, label, logits = (arguments for _, arguments in _resamplings(configuration))
    return {
        "order_image": image.get("order", 3),
        "order_label": label.get("order", 1),
        "order_logits": logits.get("order", 1),
        "order_z": image.get("order_z", 0),
        "anisotropy_threshold": NEVER_SEPARATE
        if image.get("force_separate_z") is False
        else image.get("separate_z_anisotropy_threshold", 3.0),
    }


def _network(architecture: _Architecture, dimensions: int, where: str) -> UNetConfig:
    block, blocks_key = BLOCKS[architecture.network_class_name.rsplit(".", 1)[-1]]
    arguments = _Arguments.parse(architecture.arch_kwargs, where=where)
    features = arguments.features_per_stage
    stages = (arguments.n_stages or 0) if isinstance(features, int) else len(features)

    def repeated(value: Any, count: int) -> list[Any]:
        """Repeat a single number, which nnU-Net applies to all stages or axes."""
        return list(value) if isinstance(value, tuple) else [value] * count

    def per_axis(value: Any) -> list[list[int]]:
        return [repeated(entry, dimensions) for entry in repeated(value, stages)]

    return UNetConfig.parse(
        {
            "block": block,
            "norm": "batch" if "BatchNorm" in str(architecture.arch_kwargs.get("norm_op")) else "instance",
            "features": repeated(features, stages),
            "kernel_sizes": per_axis(arguments.kernel_sizes),
            "strides": per_axis(arguments.strides),
            "encoder_blocks": repeated(getattr(arguments, blocks_key), stages),
            "decoder_blocks": repeated(arguments.n_conv_per_stage_decoder, stages - 1),
        },
        where=where,
    )


def _intensities(source: _NnunetPlans, channel: int, path: Path) -> IntensityStatistics:
    where = f"{path}, foreground_intensity_properties_per_channel, {channel}"
    return IntensityStatistics.parse(
        source.foreground_intensity_properties_per_channel.get(str(channel), {}), where=where
    )
