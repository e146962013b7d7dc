"""A plan of ours as nnU-Net v2's plans.json and dataset.json, for what nnU-Net can express."""

from __future__ import annotations

from typing import Any

from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.nnunet.plans import BLOCKS, NEVER_SEPARATE, NORMALIZATIONS, NORMS, RESAMPLING
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Plan, Resampling, Stage

PLANNER = "rfmed_export_model"
"""Stands where nnU-Net names the planner: by it an export is known again."""
READERS = {
    **dict.fromkeys((".nii.gz", ".nrrd", ".mha", ".gipl"), "SimpleITKIO"),
    ".nii": "NibabelIO",
    **dict.fromkeys((".png", ".bmp"), "NaturalImage2DIO"),
    **dict.fromkeys((".tif", ".tiff"), "Tiff3DIO"),
}
"""nnU-Net's readers by file ending."""
FLAT_MM = 999.0
"""Distance of slices that nnU-Net gives to images of one plane."""
NETWORKS = {block: (network, blocks) for network, (block, blocks) in BLOCKS.items()}
SCHEMES = {kind: scheme for scheme, kind in NORMALIZATIONS.items()}
REMEDY = "Pack the model with --to zip instead: rfmed_import_model and rfmed_predict take it"


def nnunet_plans(plan: Plan, stage_name: str) -> dict[str, Any]:
    """The content of plans.json with one configuration.

    Raises:
        PlanError: nnU-Net cannot express the plan; names all fields at fault.
    """
    stage = plan.stages[stage_name]
    if faults := _inexpressible(plan, stage_name):
        raise PlanError(
            "nnU-Net cannot express this model", where=f"plan {plan.name}", found="; ".join(faults), remedy=REMEDY
        )
    assert isinstance(stage.model, UNetConfig)
    statistics = [intensities.model_dump(mode="json") for intensities in plan.intensities]
    return {
        "dataset_name": plan.dataset,
        "plans_name": plan.name,
        "original_median_spacing_after_transp": list(stage.spacing_mm),
        "original_median_shape_after_transp": list(stage.median_shape),
        "image_reader_writer": _reader(plan),
        "transpose_forward": list(plan.transpose_forward),
        "transpose_backward": list(plan.transpose_backward),
        "configurations": {stage_name: _configuration(stage, stage.model, f"{plan.name}_{stage_name}")},
        "experiment_planner_used": PLANNER,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): each for i, each in enumerate(statistics)},
    }


def nnunet_dataset(plan: Plan) -> dict[str, Any]:
    """The content of dataset.json; the number of training cases is not part of a plan."""
    names = {name: list(value) if isinstance(value, tuple) else value for name, value in plan.labels.names.items()}
    names["background"] = 0  # nnU-Net accepts no list
    if plan.labels.ignore is not None:
        names["ignore"] = plan.labels.ignore
    content = {
        "channel_names": {str(i): name for i, name in enumerate(plan.channels)},
        "labels": names,
        "numTraining": 0,
        "file_ending": plan.file_ending,
    }
    if plan.labels.regions_class_order is not None:
        content["regions_class_order"] = list(plan.labels.regions_class_order)
    return content


def _inexpressible(plan: Plan, stage_name: str) -> list[str]:
    """Fields, with their values, that nnU-Net has no word for."""
    stage, where = plan.stages[stage_name], f"stages.{stage_name}"
    faults = []
    if not isinstance(stage.model, UNetConfig):
        faults.append(f"{where}.model.kind {stage.model.kind}")
    else:
        faults += [f"{where}.model.attention true"] * stage.model.attention
        if stage.model.input_stride is not None:
            faults.append(f"{where}.model.input_stride {list(stage.model.input_stride)}")
    if stage.extensions.task is not None:
        faults.append(f"{where}.extensions.task {stage.extensions.task.name}")
    if stage.starts_from is not None:
        faults.append(f"{where}.starts_from {stage.starts_from}")
    if _reader(plan) is None:
        faults.append(f"file_ending {plan.file_ending}" + (", reoriented" if plan.reorient else ""))
    return faults + _inexpressible_labels(plan.labels)


def _inexpressible_labels(labels: LabelSet) -> list[str]:
    """nnU-Net's label maps hold numbers of outputs, so these must be the values themselves."""
    faults = []
    values = labels.values
    if not labels.has_regions and values != tuple(range(len(values))):
        faults.append(f"labels with the values {', '.join(map(str, values))}, which are not 0, 1, 2, ...")
    if labels.ignore is not None and labels.ignore != max(values) + 1:
        faults.append(f"labels.ignore {labels.ignore}, which is not {max(values) + 1}")
    return faults


def _reader(plan: Plan) -> str | None:
    if plan.reorient is not None:
        return "NibabelIOWithReorient" if plan.file_ending in (".nii", ".nii.gz") else None
    if plan.file_ending == ".tif" and any(stage.spacing_mm[0] == FLAT_MM for stage in plan.stages.values()):
        return "NaturalImage2DIO"
    return READERS.get(plan.file_ending)


def _configuration(stage: Stage, model: UNetConfig, identifier: str) -> dict[str, Any]:
    axes = len(stage.patch_size)
    how = stage.resampling
    previous = {} if stage.previous_stage is None else {"previous_stage": stage.previous_stage}
    return {
        **previous,
        "data_identifier": identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": stage.batch_size,
        "patch_size": list(stage.patch_size),
        "median_image_size_in_voxels": list(stage.median_shape[-axes:]),
        "spacing": list(stage.spacing_mm[-axes:]),
        "normalization_schemes": [SCHEMES[each.kind] for each in stage.normalization],
        "use_mask_for_norm": [each.use_mask for each in stage.normalization],
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_data_kwargs": _resampling(how, how.order_image),
        "resampling_fn_seg_kwargs": _resampling(how, how.order_label, is_seg=True),
        "resampling_fn_probabilities_kwargs": _resampling(how, how.order_logits),
        "batch_dice": stage.loss.batch_dice,
        "architecture": _architecture(model),
    }


def _resampling(how: Resampling, order: int, *, is_seg: bool = False) -> dict[str, Any]:
    threshold = how.anisotropy_threshold
    arguments = {"is_seg": is_seg, "order": order, "order_z": how.order_z}
    if threshold == NEVER_SEPARATE:
        return {**arguments, "force_separate_z": False}
    arguments["force_separate_z"] = None
    return arguments if threshold == 3.0 else {**arguments, "separate_z_anisotropy_threshold": threshold}


def _architecture(model: UNetConfig) -> dict[str, Any]:
    network, blocks = NETWORKS[model.block]
    dimensions = model.dimensions
    arguments = {
        "n_stages": len(model.features),
        "features_per_stage": list(model.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [list(entry) for entry in model.kernel_sizes],
        "strides": [list(entry) for entry in model.strides],
        blocks: list(model.encoder_blocks),
        "n_conv_per_stage_decoder": list(model.decoder_blocks),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.{model.norm}norm.{NORMS[model.norm]}{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
