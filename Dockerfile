# Train in a container. docs/guides/containers.md has the commands.
#   docker build -t sturdy-diffusion .
#   docker run --rm --init -v sturdy:/data sturdy-diffusion /app/train.py experiment=cars
FROM python:3.12-slim

# EXTRAS=[latent,remote] installs extras, PIP_OPTIONS what pip is to be told, such as another index for torch.
ARG EXTRAS=""
ARG PIP_OPTIONS=""

# torch.compile needs a compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 sturdy && mkdir /data && chown sturdy /data
WORKDIR /app

# The dependencies first: a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p src/sturdy src/exact_resume \
    && pip install --no-cache-dir --constraint constraints.txt $PIP_OPTIONS --editable ".$EXTRAS"
COPY . .

# Runs and caches lie in /data, outside of the container, which can then be lost like a process.
USER sturdy
WORKDIR /data
VOLUME /data
ENV PYTHONUNBUFFERED=1
# SIGTERM saves the step and ends with 75; with --restart on-failure the same command continues.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python"]
CMD ["/app/train.py", "--help"]
