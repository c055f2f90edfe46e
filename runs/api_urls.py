"""The API of runs and hosts, mounted at /api/v1/."""

from __future__ import annotations

from django.urls import include, path
from rest_framework.routers import SimpleRouter

from runs import history_views, stack_api
from runs.api import HostViewSet, RunViewSet, ServiceListView
from runs.library_api import AdapterViewSet, LoraUploadsView, LoraUploadView
from runs.tensorboard.api import TensorBoardStatusView

router = SimpleRouter()
router.register("runs", RunViewSet, basename="run")
router.register("hosts", HostViewSet, basename="host")
router.register("loras", AdapterViewSet, basename="lora")
urlpatterns = [
    *router.urls,
    path("datasets/<int:dataset_pk>/pictures/<int:pk>/runs/", history_views.PictureRunsView.as_view(), name="api-seen"),
    path(
        "datasets/<int:dataset_pk>/pictures/<int:pk>/for-good/",
        history_views.DestroyPictureView.as_view(),
        name="api-destroy",
    ),
    path("datasets/<int:pk>/captioning/", include("runs.captioning_api_urls")),
    path("lora-uploads/", LoraUploadsView.as_view(), name="api-lora-uploads"),
    path("lora-uploads/<uuid:upload_id>/", LoraUploadView.as_view(), name="api-lora-upload"),
    path("services/", ServiceListView.as_view(), name="api-services"),
    path("stacks/", stack_api.StackListView.as_view(), name="api-stacks"),
    path("stacks/<slug:key>/", stack_api.StackView.as_view(), name="api-stack"),
    path("stacks/<slug:key>/read-config/", stack_api.ReadConfigView.as_view(), name="api-read-config"),
    path("runs/<int:pk>/config/", stack_api.RunConfigView.as_view(), name="api-run-config"),
    path("tensorboard/status/", TensorBoardStatusView.as_view(), name="api-tensorboard"),
]
