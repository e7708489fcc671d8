# docker build -t consensus .
# docker run --rm --gpus all -v "$PWD/runs:/srv/consensus/runs" consensus                 (experiment=digits)
# docker run --rm -e NPROC=2 -v "$PWD/runs:/srv/consensus/runs" consensus experiment=smoke potential=tan
#
# Without --gpus, or without NVIDIA's runtime, it trains on the CPU. The mounted folder must be writable for user id 1000
# (else: docker run --user "$(id -u)" ...; any id does). `docker stop -t 120 NAME` leaves time for a checkpoint.
FROM python:3.11.15-slim-bookworm

# On a GPU, Triton compiles the part by which it calls the driver, with a C compiler, when the first kernel starts.
# Debian keeps only the newest version of a package in a release, so that none can be named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/consensus

# The dependencies before the code: this layer, by far the largest, is rebuilt only when one of these two files changes.
# The lock constrains and pyproject.toml chooses, so the development tools stay out of the image; uv does not stay either.
# Compiled here, since the user of the image may not write there and would compile again at every start.
COPY pyproject.toml requirements.lock ./
RUN pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && UV_HTTP_TIMEOUT=300 uv pip install --system --no-cache --compile-bytecode \
        --requirement pyproject.toml --constraint requirements.lock \
    && pip uninstall --yes uv \
    && rm /tmp/uv-*.lock

COPY LICENSE README.md ./
COPY configs configs
COPY consensus consensus
COPY launch launch
# The constraint is for the build backend.
RUN PIP_CONSTRAINT=/opt/consensus/requirements.lock pip install --no-cache-dir --no-deps .

# Any user id may write to the working folder, and to a volume that is made from it. A checkout need not be readable for all.
RUN useradd --uid 1000 --home-dir /tmp consensus \
    && install --directory --mode 1777 /srv/consensus /srv/consensus/runs \
    && chmod -R a+rX /opt/consensus

# HOME is where matplotlib, torch and Triton keep what they need again; an id without a name has none.
# The last two are for NVIDIA's runtime: which GPUs, where nobody says, and that CUDA and nvidia-smi suffice.
ENV PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A number: where Kubernetes has runAsNonRoot, it believes no name.
USER 1000
WORKDIR /srv/consensus

# Whether training works here at all, not whether the run goes on: its exit code says that. Kubernetes ignores this line; there
# the exit code of a pod counts, and launch/health.sh may be an init container. `docker run --no-healthcheck` leaves it out.
HEALTHCHECK --interval=30m --timeout=5m --start-period=2m --retries=2 CMD ["/opt/consensus/launch/health.sh"]

# NPROC processes on this container's GPUs or cores; arguments are Hydra overrides. The script becomes torchrun, which
# passes the signal of `docker stop` on to its processes. It does not listen in its first seconds; with `docker run --init`
# the signal ends it then as well.
ENTRYPOINT ["/opt/consensus/launch/local.sh"]
CMD ["experiment=digits"]
