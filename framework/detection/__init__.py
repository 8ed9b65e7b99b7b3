"""From a pretrained backbone to a Mask R-CNN in Detectron2.

``layouts``, ``conversion``, ``normalization`` and ``weight_files`` do without Detectron2; the other modules import it.
"""
