# The app with its base model inside: docker build -t tkpo . && docker run -p 7860:7860 tkpo
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user \
    PATH=/home/user/.local/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TKPO_CACHE=/home/user/.cache/tkpo \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860
WORKDIR /home/user/app

COPY --chown=user requirements.txt ./
RUN pip install --user --no-cache-dir -r requirements.txt

# The base model is a layer of its own: it is fetched again only when these three files change.
COPY --chown=user tkpo/__init__.py tkpo/errors.py tkpo/presets.py tkpo/
RUN python -c "from tkpo.presets import resolve_model; resolve_model('qwen2.5-coder-0.5b')"

COPY --chown=user . ./

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/health', timeout=8)"
CMD ["python", "app/main.py"]
