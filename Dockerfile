# phreg on a CUDA base. From a clone:
#
#   docker build -t phreg .
#   docker run --gpus all -v $PWD/photos:/photos:ro -v $PWD/runs:/runs phreg distill facebook/dinov2-base --images /photos --output /runs/dinov2-reg
#
# torch comes from PyPI and brings its own CUDA libraries; the base needs no more than the driver's.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/phreg PATH=/opt/phreg/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache
RUN python3 -m venv $VIRTUAL_ENV

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY phreg phreg
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt ".[onnx,depth]"

RUN useradd --create-home phreg && mkdir -p /cache /runs && chown phreg /cache /runs
USER phreg
WORKDIR /runs
VOLUME /cache
ENTRYPOINT ["phreg"]
CMD ["--help"]
