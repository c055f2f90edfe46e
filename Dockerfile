# The same image is the web side (`up --web-only`), a worker (`worker`), or everything (`up`).
FROM python:3.11-slim

# For wheels of PyTorch without CUDA: --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=""
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY requirements.txt .
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep -m1 '^torch==' requirements.txt)" \
    && pip install -r requirements.txt

COPY . .
RUN useradd --create-home --uid 1000 lorapilot \
    && install -d -o lorapilot -g lorapilot /workspace /app/staticfiles
# `models list`, `models pull NAME`, as documented.
RUN printf '#!/bin/sh\nexec python /app/manage.py models "$@"\n' > /usr/local/bin/models && chmod 755 /usr/local/bin/models
USER lorapilot
ENV LORAPILOT_WORKSPACE=/workspace LORAPILOT_HOST=0.0.0.0 DJANGO_SETTINGS_MODULE=lorapilot.settings
# So that a start finds nothing to collect. The secret key that the settings make on the way is thrown away.
RUN LORAPILOT_WORKSPACE=/tmp/build python -c "import django; django.setup(); \
    from lorapilot.management.platform import collect_static_files; collect_static_files()" && rm -r /tmp/build

VOLUME /workspace
EXPOSE 7878
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-c", "import os, urllib.request as http; \
    name = os.environ.get('ALLOWED_HOSTS', 'localhost').split(',')[0].strip('.*') or 'localhost'; \
    http.urlopen(http.Request('http://127.0.0.1:7878/healthz/', headers={'Host': name}), timeout=8)"]
CMD ["python", "manage.py", "up"]
