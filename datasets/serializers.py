"""What the API shows of datasets and takes for them. Services decide what is valid."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.urls import reverse
from rest_framework import serializers

from datasets.models import Dataset, DatasetVersion, Picture, Upload
from lorapilot.models import User
from lorapilot.serializers import JobSerializer, SharingInput


class DatasetSerializer(serializers.ModelSerializer[Dataset]):
    owner = serializers.CharField(source="owner.username", read_only=True)
    groups: Any = serializers.SlugRelatedField(slug_field="name", many=True, read_only=True)
    editor_groups: Any = serializers.SlugRelatedField(
        slug_field="name", many=True, read_only=True, help_text="Of these, whose members can also change it."
    )
    picture_count = serializers.IntegerField(read_only=True)
    missing_count = serializers.IntegerField(read_only=True, help_text="Pictures without a caption.")

    class Meta:
        model = Dataset
        fields = (
            "id",
            "name",
            "trigger_word",
            "owner",
            "groups",
            "editor_groups",
            "picture_count",
            "missing_count",
            "created_at",
            "updated_at",
        )


class DatasetInput(serializers.Serializer[Dataset]):
    name = serializers.CharField(max_length=100)
    trigger_word = serializers.CharField(max_length=100, required=False, allow_blank=True)


class DatasetChanges(SharingInput, DatasetInput):
    """What to change; what is left out stays."""

    name = serializers.CharField(max_length=100, required=False)


class PictureSerializer(serializers.ModelSerializer[Picture]):
    thumbnail = serializers.SerializerMethodField()
    original = serializers.SerializerMethodField()

    class Meta:
        model = Picture
        fields = (
            "id",
            "original_name",
            "caption",
            "revision",
            "sha256",
            "extension",
            "width",
            "height",
            "bytes",
            "repeats",
            "thumbnail",
            "original",
            "created_at",
            "updated_at",
        )

    def get_thumbnail(self, picture: Picture) -> str:
        return reverse("datasets:thumbnail", args=[picture.dataset_id, picture.pk])

    def get_original(self, picture: Picture) -> str:
        return reverse("datasets:original", args=[picture.dataset_id, picture.pk])


class CaptionInput(serializers.Serializer[Picture]):
    caption = serializers.CharField(allow_blank=True, help_text="One line; line breaks become spaces.")
    revision = serializers.IntegerField(required=False, min_value=1, help_text="The one that you saw: 409 if past.")


class ChoicesInput(serializers.Serializer[Any]):
    flatten = serializers.CharField(
        default="", allow_blank=True, help_text="Fill transparency with this colour, such as #ffffff; empty keeps it."
    )
    replace_captions = serializers.BooleanField(
        default=False, help_text="Captions that come take the place of those that are there."
    )


class FilesInput(ChoicesInput):
    files = serializers.ListField(
        child=serializers.FileField(allow_empty_file=True),
        allow_empty=False,
        help_text="Pictures, caption files and ZIP archives; 32 MiB in one request.",
    )
    paths = serializers.ListField(
        child=serializers.CharField(max_length=1000),
        required=False,
        help_text="Where each file lay, in the same order: Kohya's folders (10_cat/a.png) set repeats.",
    )


class RefusedFile(serializers.Serializer[Any]):
    name = serializers.CharField()
    reason = serializers.CharField()


class ImportReportSerializer(serializers.Serializer[Any]):
    """How many pictures were added, got a new caption, or were there already; which files were refused, and why;
    what was done to pictures, and which ones were there (`notes`)."""

    detail = serializers.CharField()
    added = serializers.IntegerField()
    captioned = serializers.IntegerField()
    duplicates = serializers.IntegerField()
    refused = RefusedFile(many=True)
    notes = RefusedFile(many=True)


class VersionSerializer(serializers.ModelSerializer[DatasetVersion]):
    class Meta:
        model = DatasetVersion
        fields = ("id", "number", "name", "trigger_word", "digest", "created_at")


class VersionPicture(serializers.Serializer[Any]):
    sha256 = serializers.CharField()
    extension = serializers.CharField()
    width = serializers.IntegerField()
    height = serializers.IntegerField()
    bytes = serializers.IntegerField()
    caption = serializers.CharField()
    repeats = serializers.IntegerField()
    name = serializers.CharField()


class VersionDetailSerializer(VersionSerializer):
    pictures = VersionPicture(many=True, read_only=True)

    class Meta(VersionSerializer.Meta):
        fields = (*VersionSerializer.Meta.fields, "pictures")  # type: ignore[assignment]  # one more than its parent


class FoundFolderSerializer(serializers.Serializer[Any]):
    folder = serializers.CharField(help_text="In the workspace's datasets folder.")
    name = serializers.CharField(help_text="What its dataset will be called.")
    repeats = serializers.IntegerField()
    pictures = serializers.IntegerField()
    captions = serializers.IntegerField()


class AdoptInput(serializers.Serializer[Any]):
    folder = serializers.CharField(max_length=255)
    owner: Any = serializers.SlugRelatedField(
        slug_field="username",
        required=False,
        queryset=User.objects.filter(is_active=True),
        help_text="Whose dataset it will be; yours when left out.",
    )


class AdoptedSerializer(serializers.Serializer[Any]):
    dataset = serializers.IntegerField()
    name = serializers.CharField()
    job = JobSerializer()


class UploadInput(ChoicesInput):
    dataset = serializers.IntegerField(help_text="Id of the dataset that the file goes into.")
    filename = serializers.CharField(max_length=1000, help_text="It may have folders: 10_cat/a.png sets repeats.")
    size = serializers.IntegerField(min_value=1, help_text="Bytes of the whole file.")
    sha256 = serializers.CharField(required=False, allow_blank=True, help_text="Of the whole file, hexadecimal.")


class UploadSerializer(serializers.ModelSerializer[Upload]):
    chunk_bytes = serializers.SerializerMethodField(help_text="Send pieces of at most this size.")
    job = JobSerializer(read_only=True, allow_null=True)

    class Meta:
        model = Upload
        fields = (
            "id",
            "dataset",
            "filename",
            "size",
            "offset",
            "sha256",
            "chunk_bytes",
            "job",
            "created_at",
            "finished_at",
        )

    def get_chunk_bytes(self, upload: Upload) -> int:
        return int(settings.UPLOAD_CHUNK_BYTES)
