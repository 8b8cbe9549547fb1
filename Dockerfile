# ChronoTask in a container: docker build -t chronotask .
#
# 3.11 and later fit; 3.13 has the smallest base image of 3.12 and later.
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-alpine AS build

COPY requirements.txt /tmp/
# Wheels only: every package has one for musl, so no compiler is needed (binutils is for `strip`).
# Left out: what is there for tests, type checkers and C compilers; PyPI's copy of the time zones, which Python reads only
# where the system has none; and debug symbols, 5 MB of them. The wheels that carry a *.libs folder stay as they are:
# auditwheel has rewritten their shared objects, and strip is known to break such files.
RUN apk add --no-cache binutils \
 && sed '/^# --- tests ---/,$d' /tmp/requirements.txt > /tmp/run-time.txt \
 && pip install --no-cache-dir --no-compile --only-binary=:all: --prefix=/install -r /tmp/run-time.txt \
 && find /install -depth \
      \( -type d \( -name tests -o -name tzdata \) \
      -o -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.c' -o -name '*.h' \) \) \
      -exec rm -rf {} + \
 && rm -rf /install/bin \
 && find /install -name '*.so' \
      \( -path '*/aiohttp/*' -o -path '*/frozenlist/*' -o -path '*/multidict/*' -o -path '*/propcache/*' -o -path '*/yarl/*' \) \
      -exec strip --strip-unneeded {} +


FROM python:${PYTHON_VERSION}-alpine

# bash runs the tasks; tzdata serves Python and the tasks alike. No init such as tini: it would show the container's
# environment, a token in it too, to every task. As process 1 the service itself reaps what tasks leave in the background.
# /app/data and /app/backup are root's and open to all as /tmp is, because an unknown uid (`--user 4711`, OpenShift) must
# trust the folder as well. Both are made here because a fresh volume takes owner and mode from the image.
RUN apk add --no-cache bash tzdata \
 && addgroup -S -g 10001 chronotask \
 && adduser -S -D -H -h /app -u 10001 -G chronotask chronotask \
 && install -d -m 0755 /app \
 && install -d -o 0 -g 0 -m 1777 /app/data /app/backup

COPY --from=build /install /usr/local

# The base image has no bytecode at all, not even of the standard library, and the service may not write any. Importing
# once as root leaves it for just the modules that the program loads: 0.9 s to import instead of 2.3 s, for 5 MB
# compressed; compiling everything would cost 2 MB more and gain nothing. pip is of no use to a finished image.
RUN python -c "import aiohttp.web, croniter, mcp.server.lowlevel, mcp.server.stdio, mcp.server.streamable_http_manager" \
 && python -c "import argparse, difflib, fcntl, logging, secrets, sqlite3, zoneinfo" \
 && pip uninstall --yes --quiet --root-user-action=ignore pip

COPY --chmod=0644 chronotask.py dashboard.htm[l] /app/

# `python -m chronotask` needs 28 MB less than a script, and with its bytecode it starts sooner. (By hash: a build that
# sets the times of files would spoil it otherwise.)
# The kernel hides the environment of a program that its user may run but not read (ptrace(2), "dumpable"), from the first
# moment on: so the service and its health check have an interpreter and a BusyBox of their own. Tasks have the usual ones.
RUN python -c "import py_compile as c; c.compile('/app/chronotask.py', invalidation_mode=c.PycInvalidationMode.CHECKED_HASH)" \
 && echo /app >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/chronotask.pth" \
 && install -m 0711 "$(python -c 'import os, sys; print(os.path.realpath(sys.executable))')" /usr/local/bin/chronotask-python \
 && install -m 0711 "$(readlink -f "$(command -v wget)")" /usr/local/bin/busybox-chronotask

# Three slashes mean "relative to the working directory" to SQLAlchemy and to ChronoTask. Older instructions write
# sqlite:///app/data/chronotask.db and mean /app/data: from / it is, and four slashes mean the same.
WORKDIR /
ENV CHRONOTASK_DATABASE_URL=sqlite:///app/data/chronotask.db \
    CHRONOTASK_API_HOST=0.0.0.0

# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
VOLUME ["/app/data"]
EXPOSE 8000 8001
STOPSIGNAL SIGTERM

# BusyBox wget: a probe in Python would cost 0.3 s of CPU each time. No proxy, whatever http_proxy says.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["busybox-chronotask", "sh", "-c", "exec busybox-chronotask wget -q -Y off -T 4 -O /dev/null \"http://127.0.0.1:${CHRONOTASK_API_PORT:-8000}/health\""]

ENTRYPOINT ["chronotask-python", "-P", "-m", "chronotask"]
CMD ["--mode", "both"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ChronoTask" \
      org.opencontainers.image.description="Task scheduler for HTTP requests and bash commands, with REST and MCP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
