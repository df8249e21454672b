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

from dinov2_fast.configs import BACKBONES
from dinov2_fast.hub.backbones import BackboneWeights as BackboneWeights
from dinov2_fast.hub.backbones import backbone_entry_point
from dinov2_fast.hub.classifiers import LinearClassifier as LinearClassifier
from dinov2_fast.hub.classifiers import classifier_entry_point
from dinov2_fast.hub.depthers import DepthEstimator as DepthEstimator
from dinov2_fast.hub.depthers import dpt_depther_entry_point, linear_depther_entry_point
from dinov2_fast.hub.pixels import CenterPadding as CenterPadding
from dinov2_fast.hub.segmenters import Segmenter as Segmenter
from dinov2_fast.hub.segmenters import segmenter_entry_point

dinov2_vits14 = backbone_entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14 = backbone_entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14 = backbone_entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14 = backbone_entry_point(BACKBONES["dinov2_vitg14"])
dinov2_vits14_reg = backbone_entry_point(BACKBONES["dinov2_vits14_reg"])
dinov2_vitb14_reg = backbone_entry_point(BACKBONES["dinov2_vitb14_reg"])
dinov2_vitl14_reg = backbone_entry_point(BACKBONES["dinov2_vitl14_reg"])
dinov2_vitg14_reg = backbone_entry_point(BACKBONES["dinov2_vitg14_reg"])

dinov2_vits14_lc = classifier_entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14_lc = classifier_entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14_lc = classifier_entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14_lc = classifier_entry_point(BACKBONES["dinov2_vitg14"])
dinov2_vits14_reg_lc = classifier_entry_point(BACKBONES["dinov2_vits14_reg"])
dinov2_vitb14_reg_lc = classifier_entry_point(BACKBONES["dinov2_vitb14_reg"])
dinov2_vitl14_reg_lc = classifier_entry_point(BACKBONES["dinov2_vitl14_reg"])
dinov2_vitg14_reg_lc = classifier_entry_point(BACKBONES["dinov2_vitg14_reg"])

dinov2_vits14_ld = linear_depther_entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14_ld = linear_depther_entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14_ld = linear_depther_entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14_ld = linear_depther_entry_point(BACKBONES["dinov2_vitg14"])

dinov2_vits14_dd = dpt_depther_entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14_dd = dpt_depther_entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14_dd = dpt_depther_entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14_dd = dpt_depther_entry_point(BACKBONES["dinov2_vitg14"])

dinov2_vits14_ls = segmenter_entry_point(BACKBONES["dinov2_vits14"])
dinov2_vitb14_ls = segmenter_entry_point(BACKBONES["dinov2_vitb14"])
dinov2_vitl14_ls = segmenter_entry_point(BACKBONES["dinov2_vitl14"])
dinov2_vitg14_ls = segmenter_entry_point(BACKBONES["dinov2_vitg14"])
