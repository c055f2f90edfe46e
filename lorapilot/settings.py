"""All settings, from the environment (docs/settings.md lists each variable). Read it top to bottom."""

from __future__ import annotations

import os
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import dj_database_url
import django_stubs_ext
from csp.constants import NONE, SELF

from lorapilot import env

django_stubs_ext.monkeypatch()

BASE_DIR = env.BASE_DIR
WORKSPACE = env.path("LORAPILOT_WORKSPACE", BASE_DIR / "workspace")


def _kept_secret() -> str:
    """The secret key of an installation that sets none: made once, kept in the workspace, for its owner only."""
    file = WORKSPACE / "secret_key"
    if not file.exists():
        WORKSPACE.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return file.read_text()
        with os.fdopen(descriptor, "w") as handle:
            handle.write(secrets.token_urlsafe(50))
    return file.read_text()


# --- The installation -------------------------------------------------------------------------------------------------
DEBUG = env.flag("DEBUG", default=False)
SECRET_KEY = env.text("SECRET_KEY") or _kept_secret()
ALLOWED_HOSTS = env.words("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")
CSRF_TRUSTED_ORIGINS = env.words("CSRF_TRUSTED_ORIGINS")
WEB_HOST = env.text("LORAPILOT_HOST", "127.0.0.1")
WEB_PORT = env.number("LORAPILOT_PORT", 7878, least=1)
BEHIND_HTTPS = env.flag("BEHIND_HTTPS", default=False)
# How many proxies in front of us add to X-Forwarded-For. 0: the header is not believed.
TRUSTED_PROXIES = env.number("TRUSTED_PROXIES", 0)
SIGNUP_OPEN = env.flag("SIGNUP_OPEN", default=False)
# A worker's name for its host; its django-q2 cluster takes the tasks that are addressed to it.
HOST_NAME = env.text("LORAPILOT_HOST_NAME", socket.gethostname())
# Prefix of an nginx `internal` location over the workspace; empty: we send files ourselves.
X_ACCEL_PREFIX = env.text("X_ACCEL_PREFIX")

# --- Limits -----------------------------------------------------------------------------------------------------------
MAX_BODY_BYTES = 32 * 1024**2  # of one request; larger uploads come in chunks
MAX_JSON_BYTES = 4 * 1024**2
UPLOAD_CHUNK_BYTES = 8 * 1024**2
MAX_UPLOAD_BYTES = env.number("MAX_UPLOAD_GIB", 20, least=1) * 1024**3
MAX_PICTURE_PIXELS = env.number("MAX_PICTURE_MEGAPIXELS", 100, least=1) * 10**6
DISK_FLOOR_BYTES = env.number("DISK_FLOOR_GIB", 2) * 1024**3  # of free space; runs save and wait below it
DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES
DATA_UPLOAD_MAX_NUMBER_FILES = 500
FILE_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024**2

# --- Models from the network ------------------------------------------------------------------------------------------
MODELS_MANIFEST = env.path("MODELS_MANIFEST", BASE_DIR / "models_registry" / "data" / "models.manifest")
HF_ENDPOINT = env.text("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
# Civitai hands downloads on to its storage: one bucket of Cloudflare, and b2.civitai.com.
DOWNLOAD_HOSTS = env.words(
    "DOWNLOAD_HOSTS",
    "huggingface.co,*.huggingface.co,hf.co,*.hf.co,civitai.com,*.civitai.com,"
    "civitai-delivery-worker-prod.5ac0637cfd0766c97916cefa3764fbdf.r2.cloudflarestorage.com",
)
# `host:port` of mirrors on the operator's own network: the only ones with plain HTTP or a private address.
DOWNLOAD_LOCAL_HOSTS = env.words("DOWNLOAD_LOCAL_HOSTS")

# --- Captions from other services: datasets/captioning ----------------------------------------------------------------
# The only hosts that pictures are sent to. The first may be any server that speaks as OpenAI does.
CAPTION_URLS = {
    "openai": env.text("CAPTION_OPENAI_URL", "https://api.openai.com/v1").rstrip("/"),
    "gemini": env.text("CAPTION_GEMINI_URL", "https://generativelanguage.googleapis.com/v1beta").rstrip("/"),
    "xai": env.text("CAPTION_XAI_URL", "https://api.x.ai/v1").rstrip("/"),
}
# `host:port` of servers on the operator's own network: the only ones with plain HTTP or a private address.
CAPTION_LOCAL_HOSTS = env.words("CAPTION_LOCAL_HOSTS")

# --- Parts ------------------------------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "lorapilot.apps.LoraPilotConfig",
    "datasets.apps.DatasetsConfig",
    "models_registry.apps.ModelsRegistryConfig",
    "runs.apps.RunsConfig",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.humanize",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "unfold.apps.BasicAppConfig",  # Chart.js only; after the admin, so that the stock admin stays
    "allauth",
    "allauth.account",
    "channels",
    "csp",
    "django_filters",
    "django_htmx",
    "django_q",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "knox",
    "rest_framework",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "lorapilot.errors.UserErrorMiddleware",
]
ROOT_URLCONF = "lorapilot.urls"
ASGI_APPLICATION = "lorapilot.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "lorapilot.accounts.signup",
            ],
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
TIME_ZONE = env.text("TIME_ZONE", "UTC")
USE_TZ = True

# --- Database: SQLite tuned as measured (0 "database is locked" of 3,231 operations), or PostgreSQL -------------------
DATABASE_URL = env.text("DATABASE_URL") or f"sqlite:///{WORKSPACE / 'lorapilot.sqlite3'}"
_database: dict[str, Any] = dict(dj_database_url.parse(DATABASE_URL, conn_max_age=60, conn_health_checks=True))
if _database["ENGINE"] == "django.db.backends.sqlite3":
    _database["CONN_MAX_AGE"] = 0
    _database["OPTIONS"] = {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",  # every atomic block takes the write lock: no file work inside one
        "init_command": "PRAGMA journal_mode=WAL;PRAGMA synchronous=NORMAL;",
    }
    _database["TEST"] = {"NAME": str(WORKSPACE / "test.sqlite3")}  # a file: its locks are those of real life
    Path(_database["NAME"]).parent.mkdir(parents=True, exist_ok=True)
DATABASES = {"default": _database}

# --- Cache and channel layer: Redis when there is one, else this process's memory -------------------------------------
REDIS_URL = env.text("REDIS_URL")
if REDIS_URL:
    CACHES = {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": REDIS_URL}}
    CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {
                # redis-py's defaults: 100 connections refused 401 of 500 sockets; 5 seconds end the layer's wait of 5.
                "hosts": [{"address": REDIS_URL, "max_connections": 10_000, "socket_timeout": 30}],
                "capacity": 100,
            },
        }
    }
else:
    CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}

# --- Background work: django-q2 on the ORM broker. lorapilot/checks.py refuses other shapes ---------------------------
SLOT_LAYOUT = env.words("LORAPILOT_SLOTS")  # "0", "1", "2+3": which GPUs train, and which of them together
Q_CLUSTER: dict[str, Any] = {
    "name": "lorapilot",  # signs the tasks: the same on every host. Which cluster runs here: lorapilot/cluster.py
    "orm": "default",
    "scheduler": False,
    "workers": env.number("LORAPILOT_WORKERS", max(3, len(SLOT_LAYOUT) + 2), least=3),
    "timeout": 120,
    "retry": 180,
    "max_attempts": 1,
    "ack_failures": True,
    "catch_up": False,
    "poll": 0.2,
    "queue_limit": 1,
    "save_limit": -1,
    "ALT_CLUSTERS": {
        # Hashing, imports, thumbnails, pulls: a day's lease, so that a long job is not started twice. Two of the
        # workers may be pulling models for hours (models_registry/pulls.py); one is left for the rest.
        "io": {"workers": 3, "timeout": 86_000, "retry": 86_400, "queue_limit": 1, "save_limit": -1, "max_attempts": 1},
    },
}

# --- Trainers beside the built-in one: runs/stacks/installation.py ----------------------------------------------------
# The folder of each (empty: not installed), and its Python (empty: that of a venv in the folder).
TRAINERS = {
    "kohya": {"home": env.text("KOHYA_HOME"), "python": env.text("KOHYA_PYTHON")},
    "ai_toolkit": {"home": env.text("AI_TOOLKIT_HOME"), "python": env.text("AI_TOOLKIT_PYTHON")},
    "diffusion_pipe": {"home": env.text("DIFFUSION_PIPE_HOME"), "python": env.text("DIFFUSION_PIPE_PYTHON")},
}

# --- People -----------------------------------------------------------------------------------------------------------
AUTH_USER_MODEL = "lorapilot.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]
LOGIN_URL = "account_login"
LOGIN_REDIRECT_URL = "runs:list"
ACCOUNT_ADAPTER = "lorapilot.accounts.AccountAdapter"
ACCOUNT_LOGIN_METHODS = {"username", "email"}
ACCOUNT_SIGNUP_FIELDS = ["username*", "email", "password1*", "password2*"]
ACCOUNT_EMAIL_VERIFICATION = "none"
ACCOUNT_LOGOUT_ON_GET = False
ACCOUNT_SESSION_REMEMBER = True
ALLAUTH_TRUSTED_PROXY_COUNT = TRUSTED_PROXIES
EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"

# --- API --------------------------------------------------------------------------------------------------------------
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "lorapilot.api.ScopedTokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated", "lorapilot.api.TokenScopePermission"],
    "DEFAULT_PAGINATION_CLASS": "lorapilot.api.Pages",
    "PAGE_SIZE": 50,
    "DEFAULT_FILTER_BACKENDS": ["django_filters.rest_framework.DjangoFilterBackend"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_THROTTLE_CLASSES": [
        "rest_framework.throttling.UserRateThrottle",
        "rest_framework.throttling.AnonRateThrottle",
    ],
    "DEFAULT_THROTTLE_RATES": {
        "user": env.text("API_RATE", "1200/min"),
        "anon": "60/min",
        "login": env.text("API_LOGIN_RATE", "10/min"),
        "invitation": "20/min",
    },
    "DEFAULT_PARSER_CLASSES": [
        "lorapilot.api.BoundedJSONParser",
        "rest_framework.parsers.FormParser",
        "rest_framework.parsers.MultiPartParser",
    ],
    "NUM_PROXIES": TRUSTED_PROXIES,
    "EXCEPTION_HANDLER": "lorapilot.api.exception_handler",
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
API_TOKEN_DAYS = 90  # unless the creator says otherwise
KNOX_TOKEN_MODEL = "lorapilot.ApiToken"  # noqa: S105 a model's name
REST_KNOX = {
    "TOKEN_MODEL": KNOX_TOKEN_MODEL,
    "TOKEN_TTL": timedelta(days=API_TOKEN_DAYS),
    "AUTH_HEADER_PREFIX": "Token",
    "TOKEN_PREFIX": "lp_",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "LoRA Pilot",
    "DESCRIPTION": "Datasets, base models and training runs. Send `Authorization: Token <token>`.",
    "VERSION": "1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.IsAuthenticated"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "SCHEMA_PATH_PREFIX": "/api/v1/",
    "ENUM_NAME_OVERRIDES": {
        "OnOff": "datasets.quality_forms.ON_OFF",
        "JobStatus": "lorapilot.models.JobStatus",
        "PartState": "runs.enums.PartState",
        "RunStatus": "runs.enums.Status",
        "TokenScope": "lorapilot.models.TokenScope",
    },
}

# --- Pages and security -----------------------------------------------------------------------------------------------
STATIC_URL = "/static/"
STATIC_ROOT = env.path("STATIC_ROOT", BASE_DIR / "staticfiles")
STATICFILES_DIRS = [BASE_DIR / "static"]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "servestatic.storage.CompressedManifestStaticFilesStorage"},
}
SERVESTATIC_USE_FINDERS = DEBUG
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "img-src": [SELF, "data:", "blob:"],
        "connect-src": [SELF],
        "object-src": [NONE],
        "base-uri": [SELF],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    }
}
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = BEHIND_HTTPS
if BEHIND_HTTPS:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

# --- Log --------------------------------------------------------------------------------------------------------------
LOG_LEVEL = env.text("LOG_LEVEL", "INFO").upper()
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        name: {"level": LOG_LEVEL, "propagate": True} for name in ("lorapilot", "datasets", "models_registry", "runs")
    },
}
