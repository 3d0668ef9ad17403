"""The other servers, each a program that its own environment runs:
`PYTHON NAME_server.py MODELS_FOLDER ADDRESS`.

They know nothing of edged and import nothing of it. Each serves every ONNX file of the folder with ONNX
Runtime's defaults, takes an FP32 tensor's raw bytes and answers with those of the first output, by the
leanest way that the server has. ADDRESS is a port of 127.0.0.1, or `unix:PATH`.
"""
