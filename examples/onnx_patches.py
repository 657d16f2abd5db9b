"""Find patches without torch: python examples/onnx_patches.py anchornet.onnx IMAGE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["anchorpatch"])
side, resize, mode = (about["transform"][key] for key in ("img_size", "resize", "crop_mode"))
if mode != "center":  # nor are transparent pixels laid on about["transform"]["background"]
    sys.exit(f"{sys.argv[1]}: expected crops of mode center, found {mode}")
images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sys.argv[2:]]
margin = (1 - side / resize) / 2
crops = [ImageOps.fit(i, (side, side), Image.Resampling.BILINEAR, margin) for i in images]
_, _, classes, scales, counts, corners, _ = session.run(None, {"pixels": np.stack(crops)})
for path, crop, predicted, scale, n, found in zip(
    sys.argv[2:], crops, classes, scales, counts, corners, strict=True
):
    patches = [np.asarray(crop)[y : y + scale, x : x + scale] for y, x in found[:n].tolist()]
    print(path, about["classes"][predicted], len(patches), patches[0].shape, found[:n].tolist())
