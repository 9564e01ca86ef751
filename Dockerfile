# An image with the trainer: docker build -t rlr-trainer . && docker run --gpus all -v "$PWD:/work" rlr-trainer train --config run.yaml
# Not built by the tests. TORCH_INDEX=https://download.pytorch.org/whl/cpu makes a smaller image for machines without a GPU.
FROM python:3.11-slim

ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=tensorboard,remote

WORKDIR /opt/rlr_trainer
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch comes first and alone, as in the Makefile; this layer stays while the code changes
RUN pip install --no-cache-dir -c constraints.txt torch --index-url ${TORCH_INDEX}
COPY rlr_trainer ./rlr_trainer
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

WORKDIR /work
ENTRYPOINT ["rlr-trainer"]
CMD ["--help"]
