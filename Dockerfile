FROM python:3.13-slim AS build
# What .dockerignore lets through: what the package is made of.
COPY . /src
# Wheels only, so that it needs no compiler, on amd64 and arm64 alike.
RUN pip install --no-cache-dir --only-binary=:all: --prefix=/install "/src[video]"

FROM python:3.13-slim
LABEL org.opencontainers.image.title="immich-analyze" \
      org.opencontainers.image.description="Describes every photo of an Immich library with a vision model on your own machine" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /install /usr/local

# Other than the tool's own defaults: a container runs on, says how it is, and has the library in /data.
ENV IMMICH_ANALYZE_MODE=combined \
    IMMICH_ANALYZE_HEALTH_PORT=3000 \
    IMMICH_ANALYZE_IMMICH_ROOT=/data

# It only reads /data, as the first user of most machines; run it as another one where the previews
# are not readable for all.
USER 1000:1000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=1m --timeout=15s --start-period=3m CMD ["immich-analyze", "--healthcheck"]
ENTRYPOINT ["immich-analyze"]
