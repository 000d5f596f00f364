# crossflow in a container.
#
#   docker build -t crossflow .                              CPU
#   docker build -t crossflow --build-arg TORCH=cu130 .      GPU; run it with --gpus all
#   docker run --rm -v "$PWD:/work" crossflow train --task t2i
#
# TORCH: the build of torch that uv installs (cpu, cu126, cu130, ...). The driver of the machine is all that a CUDA build needs.
# More loader workers need more shared memory: --shm-size 8g.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG TORCH=cpu
ARG EXTRAS=onnx,video

COPY requirements.txt pyproject.toml setup.py MANIFEST.in README.md CHANGELOG.md LICENSE *.py py.typed /source/
COPY benchmarks /source/benchmarks
COPY commands /source/commands
COPY configs /source/configs
COPY core /source/core
COPY data /source/data
COPY demo /source/demo
COPY engine /source/engine
COPY networks /source/networks
COPY released /source/released
COPY tasks /source/tasks
COPY zoo /source/zoo
RUN pip install --no-cache-dir uv \
 && uv pip install --system --no-cache --torch-backend "${TORCH}" "/source[${EXTRAS}]" \
 && rm -rf /source

RUN useradd --create-home crossflow && mkdir /work && chown crossflow /work
USER crossflow
WORKDIR /work
ENTRYPOINT ["crossflow"]
CMD ["--help"]
