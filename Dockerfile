# One image for operator, proxy and agent: a static binary and nothing else.
# For amd64 and arm64: docker buildx build --platform linux/amd64,linux/arm64 .
FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# Static, because the agent's copy runs in whatever image PostgreSQL comes in.
RUN target="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" \
       cargo build --locked --release -p helios --target "$target" \
    && install -D -s "target/$target/release/helios" /out/helios

FROM scratch
COPY --from=build /out/helios /helios
USER 65532:65532
ENTRYPOINT ["/helios"]
