# docker build -t consensus .
# docker run --rm --gpus all -v "$PWD/runs:/srv/consensus/runs" consensus                 (experiment=digits)
# docker run --rm -e NPROC=2 -v "$PWD/runs:/srv/consensus/runs" consensus experiment=smoke potential=tan
#
# The mounted folder must be writable for user id 1000 (else: docker run --user "$(id -u)" ...).
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    UV_SYSTEM_PYTHON=1 \
    UV_NO_CACHE=1 \
    UV_HTTP_TIMEOUT=300

WORKDIR /opt/consensus

# The dependencies first: this layer, by far the largest, is rebuilt only when one of these two files changes.
# The lock constrains and pyproject.toml chooses, so the development tools stay out of the image.
COPY pyproject.toml requirements.lock ./
RUN pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && uv pip install --requirement pyproject.toml --constraint requirements.lock

COPY LICENSE README.md ./
COPY configs configs
COPY consensus consensus
COPY launch launch
RUN uv pip install --no-deps --build-constraint requirements.lock .

RUN useradd --create-home --uid 1000 consensus \
    && install --directory --owner consensus --group consensus /srv/consensus /srv/consensus/runs
USER consensus
WORKDIR /srv/consensus

# NPROC processes on this container's GPUs or cores; arguments are Hydra overrides.
ENTRYPOINT ["/opt/consensus/launch/local.sh"]
CMD ["experiment=digits"]
