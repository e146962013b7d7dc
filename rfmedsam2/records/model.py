"""Records of network architectures (U-Net, RFMedSAM 2, those of libraries), one per stage, distinguished by `kind`."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Union

from pydantic import Field, JsonValue, model_validator
from typing_extensions import Self

from rfmedsam2.choices import Backbone, Step0Training
from rfmedsam2.records.base import Record

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Whole = Annotated[int, Field(ge=0, le=1_000_000_000)]
Rate = Annotated[float, Field(gt=0, le=1e30)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
"""Products of a rate and a factor are finite in float32."""
Width = Annotated[int, Field(ge=1, le=1 << 16)]
"""Channels of a layer."""
LARGEST_KERNEL, MOST_BLOCKS = 99, 1000  # building more blocks takes many seconds
Depth = Annotated[int, Field(ge=1, le=MOST_BLOCKS // 4)]
LARGEST_FRAME = 1 << 15
"""Pixels along a side: above, one frame alone takes more memory than machines have."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of the old value kept in a running mean."""


class UNetConfig(Record):
    """A U-Net of dynamic-network-architectures: plain or residual encoder, leaky ReLU."""

    kind: Literal["unet"] = "unet"
    block: Literal["plain", "residual"] = "plain"
    norm: Literal["instance", "batch"] = "instance"
    """Normalization after convolutions; batch is nnUNetTrainerBN's."""
    features: tuple[Width, ...]
    """Channels per resolution stage, highest resolution first."""
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    """Stride of each stage's first convolution; the first stage's is 1."""
    encoder_blocks: tuple[Count, ...]
    """Convolutions (plain) or residual blocks per stage."""
    decoder_blocks: tuple[Count, ...]
    attention: bool = False
    """Self-attention over the bottleneck's positions (RFMedSAM 2 paper, Table 7)."""
    input_stride: tuple[Count, ...] | None = None
    """Sides in voxels of the blocks over which the input is averaged before the first stage, one per axis; the logits
    are interpolated back to the patch (linearly along each axis). None: the network sees every voxel."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        stages = len(self.features)
        lengths = {
            "kernel_sizes": (len(self.kernel_sizes), stages),
            "strides": (len(self.strides), stages),
            "encoder_blocks": (len(self.encoder_blocks), stages),
            "decoder_blocks": (len(self.decoder_blocks), stages - 1),
        }
        wrong = [f"{name} has {n} entries, not {m}" for name, (n, m) in lengths.items() if n != m]
        if wrong:
            raise ValueError(f"{stages} stages, but " + ", ".join(wrong))
        axes = {len(entry) for entry in (*self.kernel_sizes, *self.strides)}
        if stages < 2 or len(axes) != 1 or not axes <= {2, 3}:
            raise ValueError("a network needs at least two stages, and kernels and strides with two or three axes each")
        if any(not 1 <= n <= LARGEST_KERNEL for entry in (*self.kernel_sizes, *self.strides) for n in entry):
            raise ValueError(f"kernel sizes and strides must be 1 or more, and at most {LARGEST_KERNEL}")
        if (blocks := sum(self.encoder_blocks) + sum(self.decoder_blocks)) > MOST_BLOCKS:
            raise ValueError(f"encoder_blocks and decoder_blocks sum to {blocks}, above {MOST_BLOCKS}")
        if self.input_stride is not None and len(self.input_stride) != self.dimensions:
            raise ValueError(f"input_stride {self.input_stride} does not have one entry for each of {axes.pop()} axes")
        return self

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.strides[0])

    @property
    def blocks(self) -> tuple[int, ...]:
        """`input_stride`, 1 along every axis where the network sees every voxel."""
        return self.input_stride or (1,) * self.dimensions

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Voxels of the patch per position of the bottleneck along each axis; patches are a multiple of it."""
        return tuple(math.prod(axis) for axis in zip(self.blocks, *self.strides, strict=True))


LIGHT_BACKBONES: tuple[Backbone, ...] = ("mobile_sam", "lite_medsam")
"""SAMs with a TinyViT encoder; their weights include no memory modules."""
PromptGenerator = Literal[
    "unet", "object_queries", "scored_object_queries", "point_embeddings", "hierarchical_masks", "gt"
]
"""RFMedSAM 2 paper, Fig. 4(4): unet is (e) and (f), object_queries (a), scored_object_queries (b), point_embeddings
(c), hierarchical_masks (d); gt takes boxes from reference labels or from a user."""
MemoryStrategy = Literal["sam2", "preceding", "following", "both"]
"""RFMedSAM 2 paper, Fig. 4(2): sam2 is (a), preceding (b), following (c), both (d)."""


class AdapterConfig(Record):
    """Trainable adapters in a frozen SAM 2 (RFMedSAM 2 paper, section 3.3.3, appendices C and D)."""

    blocks: Literal["dwconv", "plain", "none"] = "dwconv"
    """In attention blocks: DWConvAdapters on image features (Fig. 4(3b)), plain ones alone (Fig. 4(3a)), or none."""
    convolutions: Literal["cnn", "none"] = "cnn"
    """CNN-Adapters after convolutions."""
    encoder: bool = True
    """Also in the image encoder. If off, a frozen encoder needs no gradients and its features can be cached."""
    channels: bool = False
    """Train the channel adapter although a frozen encoder has no adapters: gradients pass through the encoder to it,
    and features cannot be cached. Else it stays the mean of its channels; with one or three little is lost."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Bottleneck width as a fraction of the feature width."""
    channel_hidden: Width = 16
    """Hidden channels of the channel adapter (M -> hidden -> 3)."""


class CrossFit(Record):
    """Cross-fitted Step 0: U-Nets trained on parts of the training cases predict the cases that they have not seen."""

    folds: Annotated[int, Field(ge=2)] = 4
    """Number of parts, each predicted by a U-Net trained on the others."""
    iterations: Count | None = None
    """Optimizer steps of each U-Net; None: as many as the stage's training."""
    learning_rate: Rate | None = None
    """Initial learning rate of the U-Nets; None: the stage's."""


class Disturbance(Record):
    """Random changes of what Steps 1 and 2 are given, in training only: the errors of new cases vary more."""

    box_jitter: Whole = 0
    """Every side of a box prompt moves by at most this many pixels of the patch."""
    logit_noise: Factor = 0.0
    """Standard deviation of smooth noise that is added to fixed logits of Step 0 (`step0` crossfit)."""
    noise_voxels: Count = 8
    """Distance in voxels over which this noise varies."""
    memory_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that Step 2 is not given the memory of a neighboring slice."""


class RefinementLoss(Record):
    """What Steps 1 and 2 learn from besides their class maps."""

    own_masks: Factor = 0.0
    """Weight of cross-entropy + Dice of SAM 2's masks by themselves, each object against all else: trains the decoder
    while the gates of `output` gated are still shut, and for boxes from a person, whose masks stand alone."""
    box_margin: Factor | None = None
    """Losses of Steps 1 and 2 count voxels in the boxes of the decoded prompts alone, widened by this share of their
    sides; None: whole slices."""


class RFMedSam2Config(Record):
    """RFMedSAM 2: a prompt generator (Step 0), SAM 2 on its prompts (Step 1), SAM 2 with memory (Step 2)."""

    kind: Literal["rfmedsam2"] = "rfmedsam2"
    generator: PromptGenerator = "unet"
    unet: UNetConfig | None
    """Step 0's network; None for generators without one. A 2D network processes single slices."""
    backbone: Backbone = "sam2_large"
    frame_size: Annotated[int, Field(ge=32, le=LARGEST_FRAME)]
    """Side length in pixels of SAM 2's square input frames, a multiple of 32; slices of another size are resized."""
    encoder_size: Annotated[int, Field(ge=32, le=LARGEST_FRAME)] | None = None
    """Side length in pixels at which frames are shown to a light SAM's image encoder; its features are averaged to the
    grid of `frame_size`. None: MobileSAM's is `frame_size`, LiteMedSAM's the slice's own, up to 256. LiteMedSAM was
    trained on 256 and MobileSAM on 1024 pixels; the time grows with the area."""
    refinements: Literal[1, 2] = 2
    """Steps after Step 0: 1 ends with Step 1 (Fig. 4(4e)), 2 with memory (Fig. 4(4f))."""
    strategy: MemoryStrategy = "preceding"
    memory_frames: Annotated[int, Field(ge=0, le=6)] = 6
    """Number of neighboring frames on each side that Step 2's memory covers, besides the current one."""
    object_scores: bool = False
    """Predict whether a prompted object is present, and empty its mask if not (RFMedSAM 2 paper, Table 4)."""
    mask_prompt: bool = True
    """Also prompt with the previous step's mask: the path by which SAM 2's losses reach the prompt generator."""
    propagate_loss: bool = True
    """Losses of Steps 1 and 2 reach the prompt generator (the paper's loss propagation). Off: the U-Net learns from its
    own loss only; meant for a SAM 2 trained from scratch, whose gradients are uninformative at first."""
    output: Literal["replace", "detail", "correct", "gated"] = "replace"
    """How a step's mask comes from SAM 2's, which has a quarter of the frame's resolution. replace: it is SAM 2's.
    detail: SAM 2's, plus what the mask prompt holds beyond that resolution. gated: Step 0's logits plus SAM 2's times a
    gate, one per step and class, that is learned and starts at 0; memories are of the masks that result. correct: the
    class map of the step before plus SAM 2's output, and memories of that output alone (older plans)."""
    memory_layers: Depth | None = None
    """Layers of memory attention, for backbones whose memory has no published weights; None: the backbone's (sam2's 4
    for light SAMs, as in older plans; nano has 2)."""
    memory_width: Width | None = None
    """Hidden width of these layers' MLPs; None: the backbone's (sam2's 2048 for light SAMs, as in older plans)."""
    gate_learning_rate: Rate = 0.01
    """Learning rate of the gates of `output` gated, which follows the schedule of all others."""
    step2_mask_prompt: Literal["class_map", "one_against_rest"] = "class_map"
    """What Step 2's mask prompts are made of: Step 1's log-odds of a class against all others, as in Step 1, or its
    logits against the background alone (older plans)."""
    given_boxes: Literal["composed", "replace"] = "composed"
    """What boxes from a person do where Step 0 predicts masks. replace: they are decoded without its mask prompts, and
    SAM 2's masks replace its own. composed: as Step 0's own boxes (older plans)."""
    freeze_backbone: bool = True
    """Freeze pre-trained weights; parts without pre-trained weights are always trained."""
    fitted_windows: bool = False
    """tiny, small, base_plus: attention windows of 8, 4, 16, 8 positions instead of 8, 4, 14, 7. No padding at
    256 and 512 pixels, a third faster; but the published weights were trained with the latter."""
    adapters: AdapterConfig = AdapterConfig()
    cached_views: Whole = 0
    """Number of augmented patches of every training case that are trained on, whose features from the frozen encoder
    are computed once and kept on disk; 0: every patch is drawn and augmented for itself."""
    step0: Step0Training = "joint"
    """How Step 0's U-Net is trained. joint: with Steps 1 and 2. crossfit: beforehand, and Steps 1 and 2 learn from
    fixed logits of U-Nets that were not trained on the case, which have the errors of new cases."""
    crossfit: CrossFit = CrossFit()
    disturbance: Disturbance = Disturbance()
    refinement_loss: RefinementLoss = RefinementLoss()

    @property
    def dimensions(self) -> int:
        """Always 3: a volume is a sequence of frames."""
        return 3

    @property
    def encoder_learns(self) -> bool:
        """Whether the image encoder has parameters that are trained."""
        return self.adapters.encoder or not self.freeze_backbone or self.backbone == "nano"

    @property
    def gradients_in_encoder(self) -> bool:
        """Whether gradients are needed through the image encoder, for itself or for the channel adapter before it."""
        return self.encoder_learns or self.adapters.channels

    @property
    def total_stride(self) -> tuple[int, ...]:
        """That of Step 0's network; 1 along axes that it does not see, and where there is none."""
        own = () if self.unet is None else self.unet.total_stride
        return (1,) * (3 - len(own)) + own

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if (self.generator == "unet") != (self.unet is not None):
            raise ValueError(f"generator {self.generator} {'needs' if self.generator == 'unet' else 'cannot use'} unet")
        if self.frame_size % 32:
            raise ValueError(f"frame_size {self.frame_size} is not a multiple of 32")
        if self.output != "replace" and self.generator not in ("unet", "hierarchical_masks"):
            raise ValueError(f"output {self.output} needs a generator that predicts masks, not {self.generator}")
        new_memory = self.memory_layers is not None or self.memory_width is not None
        if new_memory and self.backbone not in (*LIGHT_BACKBONES, "nano"):
            raise ValueError(f"memory_layers and memory_width are those of {self.backbone}'s published weights")
        if self.encoder_size is not None:
            self._require_encoder_size(self.encoder_size)
        if self.step0 == "crossfit" and (self.unet is None or self.unet.dimensions != 3):
            raise ValueError("step0 crossfit needs generator unet, with a 3D U-Net")
        if self.cached_views and self.gradients_in_encoder:
            raise ValueError(
                f"cached_views {self.cached_views} (0: keep none), but features of an image encoder that learns cannot "
                "be kept: set freeze_backbone true, adapters.encoder and .channels false, with a backbone that has "
                "published weights"
            )
        if not self.propagate_loss and self.generator != "unet":
            raise ValueError(f"generator {self.generator} needs propagate_loss; only unet works without it")
        return self

    def _require_encoder_size(self, size: int) -> None:
        if self.backbone not in LIGHT_BACKBONES:
            raise ValueError(f"encoder_size is for {' and '.join(LIGHT_BACKBONES)}; {self.backbone} sees frame_size")
        least = self.frame_size if self.backbone == "mobile_sam" else self.frame_size // 4
        if size < least or size % 32:
            raise ValueError(f"encoder_size {size} is not a multiple of 32, or below {least}, the decoder's grid")


ExtensionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)]
"""As it stands before the "=" of an entry point."""


class Extension(Record):
    """One extension, by the name under which an installed package registers it."""

    name: ExtensionName
    package: ExtensionName | None = None
    """Distribution that it comes from: what to install where it is missing, and which is meant where two packages
    register the name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Checked by the extension's own record, where it has one."""


class StageExtensions(Record):
    """What a stage takes from other packages, beside its network (model kind `custom`)."""

    task: Extension | None = None
    """Trains in the place of ours."""
    loss: Extension | None = None
    """In the place of cross-entropy + Dice, at every supervised resolution."""
    augmentation: tuple[Extension, ...] = ()
    """Applied to training patches in this order, after `augmentation` of the stage."""


class CustomConfig(Extension):
    """A network that an installed package registers."""

    kind: Literal["custom"] = "custom"
    dimensions: Literal[2, 3] = 3
    """Axes of its patches."""
    patch_multiple: Count = 1
    """Every axis of a patch is a multiple of this."""

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Patches are a multiple of it along each axis."""
        return (self.patch_multiple,) * self.dimensions


class LibraryConfig(Record):
    """A network of a library as it is published: one output, no deep supervision, patches a multiple of one number."""

    dimensions: Literal[2, 3] = 3
    """Axes of its patches."""

    @property
    def title(self) -> str:
        """Name and size, for people."""
        raise NotImplementedError

    @property
    def patch_multiple(self) -> int:
        """Every axis of a patch is a multiple of this."""
        raise NotImplementedError

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Patches are a multiple of it along each axis."""
        return (self.patch_multiple,) * self.dimensions


class SegResNetConfig(LibraryConfig):
    """MONAI's SegResNet (Myronenko 2018, without its autoencoder)."""

    kind: Literal["segresnet"] = "segresnet"
    features: Annotated[int, Field(ge=8, le=1 << 16, multiple_of=8)] = 32
    """Channels at full resolution, doubled at every stage; group norm has 8 groups."""
    encoder_blocks: Annotated[tuple[Depth, ...], Field(min_length=2, max_length=7)] = (1, 2, 2, 4)
    """Residual blocks per stage; the decoder has one at each."""

    @property
    def title(self) -> str:
        """Name and width."""
        return f"SegResNet of {self.features} features"

    @property
    def patch_multiple(self) -> int:
        """2 for every stage after the first."""
        return 2 ** (len(self.encoder_blocks) - 1)


class SwinUNETRConfig(LibraryConfig):
    """MONAI's SwinUNETR (Hatamizadeh et al. 2022)."""

    kind: Literal["swinunetr"] = "swinunetr"
    features: Annotated[int, Field(ge=12, le=1 << 16, multiple_of=12)] = 48
    """Channels of the first stage, doubled at every stage."""
    depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 2, 2)
    """Transformer blocks per stage."""

    @property
    def title(self) -> str:
        """Name and width."""
        return f"SwinUNETR of {self.features} features"

    @property
    def patch_multiple(self) -> int:
        """Tokens of 2 voxels, merged four times."""
        return 32


PRIMUS_SIZES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
"""Width, layers and heads by size (Wald et al. 2025), as in nnU-Net's trainers."""


class PrimusConfig(LibraryConfig):
    """Primus of dynamic-network-architectures, a plain vision transformer (Wald et al. 2025)."""

    kind: Literal["primus"] = "primus"
    dimensions: Literal[3] = 3  # pyright: ignore[reportIncompatibleVariableOverride]
    size: Literal["S", "B", "M", "L"] = "M"
    """As nnUNet_Primus_S_Trainer to nnUNet_Primus_L_Trainer of nnU-Net."""

    @property
    def title(self) -> str:
        """Name and size."""
        return f"Primus {self.size}"

    @property
    def patch_multiple(self) -> int:
        """Side of a token in voxels."""
        return 8


LibraryNetwork = SegResNetConfig | SwinUNETRConfig | PrimusConfig
ModelConfig = Annotated[
    Union[UNetConfig, RFMedSam2Config, LibraryNetwork, CustomConfig],  # noqa: UP007 - for pydantic
    Field(discriminator="kind"),
]
"""Union of all model records, distinguished by `kind`."""
