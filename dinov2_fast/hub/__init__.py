"""The reference's torch.hub entry points, as in ``torch.hub.load(repository, "dinov2_vits14")``.

    dinov2_vit{s,b,l,g}14[_reg]        backbones
    dinov2_vit{s,b,l,g}14[_reg]_lc     with a linear classifier for ImageNet
    dinov2_vit{s,b,l,g}14_ld           with a linear depth estimator for NYU (indoors) or KITTI (streets)
    dinov2_vit{s,b,l,g}14_dd           with a DPT depth estimator for the same data
    dinov2_vit{s,b,l,g}14_ls           with a linear segmenter for ADE20K or VOC2012. The reference publishes the files
                                       of these heads but has no entry points for them.

The signatures are those of facebookresearch/dinov2 (dinov2/hub): keyword arguments only, `pretrained`, `weights`,
`layers` and any argument of the model's constructor.
"""

from dinov2_fast.hub.backbones import (
    BackboneWeights,
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)
from dinov2_fast.hub.classifiers import (
    LinearClassifier,
    dinov2_vitb14_lc,
    dinov2_vitb14_reg_lc,
    dinov2_vitg14_lc,
    dinov2_vitg14_reg_lc,
    dinov2_vitl14_lc,
    dinov2_vitl14_reg_lc,
    dinov2_vits14_lc,
    dinov2_vits14_reg_lc,
)
from dinov2_fast.hub.depthers import (
    DepthEstimator,
    dinov2_vitb14_dd,
    dinov2_vitb14_ld,
    dinov2_vitg14_dd,
    dinov2_vitg14_ld,
    dinov2_vitl14_dd,
    dinov2_vitl14_ld,
    dinov2_vits14_dd,
    dinov2_vits14_ld,
)
from dinov2_fast.hub.pixels import CenterPadding
from dinov2_fast.hub.segmenters import (
    Segmenter,
    dinov2_vitb14_ls,
    dinov2_vitg14_ls,
    dinov2_vitl14_ls,
    dinov2_vits14_ls,
)

__all__ = [
    "BackboneWeights",
    "CenterPadding",
    "DepthEstimator",
    "LinearClassifier",
    "Segmenter",
    "dinov2_vitb14",
    "dinov2_vitb14_dd",
    "dinov2_vitb14_lc",
    "dinov2_vitb14_ld",
    "dinov2_vitb14_ls",
    "dinov2_vitb14_reg",
    "dinov2_vitb14_reg_lc",
    "dinov2_vitg14",
    "dinov2_vitg14_dd",
    "dinov2_vitg14_lc",
    "dinov2_vitg14_ld",
    "dinov2_vitg14_ls",
    "dinov2_vitg14_reg",
    "dinov2_vitg14_reg_lc",
    "dinov2_vitl14",
    "dinov2_vitl14_dd",
    "dinov2_vitl14_lc",
    "dinov2_vitl14_ld",
    "dinov2_vitl14_ls",
    "dinov2_vitl14_reg",
    "dinov2_vitl14_reg_lc",
    "dinov2_vits14",
    "dinov2_vits14_dd",
    "dinov2_vits14_lc",
    "dinov2_vits14_ld",
    "dinov2_vits14_ls",
    "dinov2_vits14_reg",
    "dinov2_vits14_reg_lc",
]
