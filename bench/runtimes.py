from dataclasses import replace

from bench.peers import OURS

ONNXRUNTIME = replace(OURS, name="onnxruntime", missing="stub")
OPENVINO = replace(OURS, name="openvino", missing="stub")
