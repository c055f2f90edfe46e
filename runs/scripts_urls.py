"""The addresses that existing scripts call, at the root and without a slash at the end."""

from __future__ import annotations

from django.urls import path

from runs import scripts_api as views

urlpatterns = [
    path("api/trainpilot/start", views.TrainPilotStart.as_view(), name="script-trainpilot-start"),
    path("api/trainpilot/stop", views.TrainPilotStop.as_view(), name="script-trainpilot-stop"),
    path("api/trainpilot/logs", views.TrainPilotLogs.as_view(), name="script-trainpilot-logs"),
    path("api/trainpilot/toml", views.TrainPilotToml.as_view(), name="script-trainpilot-toml"),
    path("api/trainpilot/model-check", views.TrainPilotModelCheck.as_view(), name="script-trainpilot-model-check"),
    path("dpipe/train/validate", views.DiffusionPipeValidate.as_view(), name="script-dpipe-validate"),
    path("dpipe/train/start", views.DiffusionPipeStart.as_view(), name="script-dpipe-start"),
    path("dpipe/train/stop", views.DiffusionPipeStop.as_view(), name="script-dpipe-stop"),
    path("dpipe/train/logs", views.DiffusionPipeLogs.as_view(), name="script-dpipe-logs"),
    path("api/datasets", views.DatasetList.as_view(), name="script-datasets"),
    path("api/models", views.ModelList.as_view(), name="script-models"),
    path("api/models/<str:name>/pull/start", views.PullStart.as_view(), name="script-pull-start"),
    path("api/models/<str:name>/pull/status", views.PullStatusView.as_view(), name="script-pull-status"),
    path("api/services", views.ServiceList.as_view(), name="script-services"),
    path("api/telemetry", views.Telemetry.as_view(), name="script-telemetry"),
    path("api/tensorboard/status", views.TensorBoardStatus.as_view(), name="script-tensorboard-status"),
]
