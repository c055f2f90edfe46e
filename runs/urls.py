"""Pages of runs, below /runs/."""

from __future__ import annotations

from django.urls import path

from runs import compare_views, config_views, history_views, publish_views, views

app_name = "runs"
urlpatterns = [
    path("", views.list_runs, name="list"),
    path("new/options/", config_views.show_options, name="options"),
    path("new/write-config/", config_views.write_config, name="write_config"),
    path("new/read-config/", config_views.read_config, name="read_config"),
    path("base-config/", config_views.base_config, name="base_config"),
    path("<int:run_id>/config/", config_views.show_config, name="config"),
    path("<int:run_id>/run-on/", config_views.run_on, name="run_on"),
    path("new/", views.new_run, name="new"),
    path("preview/", views.preview, name="preview"),
    path("compare/", compare_views.compare, name="compare"),
    path("compare/choose/", compare_views.choose, name="choose"),
    path("of-picture/<int:dataset_pk>/<int:picture_pk>/", history_views.of_picture, name="of_picture"),
    path("of-picture/<int:dataset_pk>/<int:picture_pk>/destroy/", history_views.destroy, name="destroy_picture"),
    path("of-versions/<int:dataset_pk>/", history_views.of_versions, name="of_versions"),
    path("<int:run_id>/", views.show_run, name="detail"),
    path("<int:run_id>/artifacts/", views.show_part, {"part": "artifacts"}, name="artifacts"),
    path("<int:run_id>/samples/", views.show_part, {"part": "samples"}, name="samples"),
    path("<int:run_id>/events/", views.show_part, {"part": "events"}, name="events"),
    path("<int:run_id>/attempts/", views.show_part, {"part": "attempts"}, name="attempts"),
    path("<int:run_id>/adapted/", views.show_part, {"part": "adapted"}, name="adapted"),
    path("<int:run_id>/status/", views.show_part, {"part": "status"}, name="status"),
    path("<int:run_id>/artifacts/<int:checkpoint_id>/", views.download, name="download"),
    path("<int:run_id>/artifacts/<int:checkpoint_id>/publish/", publish_views.publish, name="publish"),
    path("<int:run_id>/artifacts/<int:checkpoint_id>/unpublish/", publish_views.unpublish, name="unpublish"),
    path("<int:run_id>/samples/<int:sample_id>/", views.sample_file, name="sample_file"),
    path("<int:run_id>/log/", views.log, name="log"),
    path("<int:run_id>/stop/", views.stop, name="stop"),
    path("<int:run_id>/pause/", views.pause, name="pause"),
    path("<int:run_id>/kill/", views.kill, name="kill"),
    path("<int:run_id>/resume/", views.resume, name="resume"),
    path("<int:run_id>/retry/", views.retry, name="retry"),
    path("<int:run_id>/hold/", views.hold, name="hold"),
    path("<int:run_id>/release/", views.release, name="release"),
    path("<int:run_id>/move/", views.move, name="move"),
    path("<int:run_id>/priority/", views.set_priority, name="priority"),
    path("<int:run_id>/delete/", views.delete, name="delete"),
    path("<int:run_id>/share/", views.share, name="share"),
]
