"""Datasets, their pictures, immutable versions, and uploads under way.

Pictures are stored once by content (`<workspace>/datasets/pictures/<aa>/<sha256>.<ext>`); a version lists them by hash,
so that editing or deleting never changes what a run was trained on.
"""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from datasets.captioning.enums import REMOTE, Captioner, Proposal, Which
from lorapilot.access import SharedQuerySet, SharedToEdit
from lorapilot.models import ChunkedUpload, Job


class Dataset(SharedToEdit):
    name = models.CharField(max_length=100)
    trigger_word = models.CharField(
        max_length=100, blank=True, help_text="The word that calls the concept in a prompt."
    )
    adopted_from = models.CharField(
        max_length=255, blank=True, help_text="Folder of the workspace's datasets that it was copied from, if one."
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    objects = SharedQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["-updated_at"]
        constraints: ClassVar = [models.UniqueConstraint("owner", Lower("name"), name="dataset_name_unique_per_owner")]

    def __str__(self) -> str:
        return self.name


class Picture(models.Model):
    """One picture of a dataset: its file by content hash, and its caption."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="pictures")
    sha256 = models.CharField(max_length=64)
    source_sha256 = models.CharField(
        max_length=64, blank=True, help_text="Of the file that came: another than sha256 where it was converted."
    )
    extension = models.CharField(max_length=5, help_text="Of the stored file, without the dot: png, jpg, webp.")
    width = models.PositiveIntegerField()
    height = models.PositiveIntegerField()
    bytes = models.PositiveBigIntegerField()
    original_name = models.CharField(max_length=255, help_text="As uploaded; shown only, never used as a path.")
    caption = models.TextField(blank=True)
    revision = models.PositiveIntegerField(default=1, help_text="Counts the captions; see caption_edits.py.")
    repeats = models.PositiveSmallIntegerField(default=1)
    # {"rotation": degrees clockwise, "crop": [left, top, width, height] or None, "original": {…}}, see
    # datasets/edits.py; the other fields are then those of the edited file.
    edit = models.JSONField(null=True, blank=True)
    fingerprint = models.CharField(max_length=38, blank=True, help_text="How it looks; see datasets/fingerprints.py.")
    fault = models.CharField(max_length=7, blank=True, help_text="What was wrong with its file when last checked.")
    checked_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering: ClassVar = ["pk"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["dataset", "sha256"], name="picture_once_per_dataset"),
            models.CheckConstraint(name="picture_repeats_positive", condition=Q(repeats__gte=1)),
        ]

    def __str__(self) -> str:
        return self.original_name


class BulkEdit(models.Model):
    """One edit of many captions, or the deletion of many pictures, with what undoing it needs."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="bulk_edits")
    actor = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    label = models.CharField(max_length=200, help_text="What was done, for a person.")
    picture_count = models.PositiveIntegerField(default=0, help_text="Pictures that were changed, or deleted.")
    # Of a deletion: the rows that restoring it writes; see picture_removal.py.
    removed = models.JSONField(default=list, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    undone_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-pk"]

    def __str__(self) -> str:
        return self.label

    @property
    def is_deletion(self) -> bool:
        return bool(self.removed)


class CaptionChange(models.Model):
    """That a picture's caption was `before` and became `after`, its revision `revision` with it."""

    picture = models.ForeignKey(Picture, on_delete=models.CASCADE, related_name="caption_changes")
    edit = models.ForeignKey(BulkEdit, null=True, blank=True, on_delete=models.CASCADE, related_name="changes")
    actor = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    before = models.TextField(blank=True)
    after = models.TextField(blank=True)
    revision = models.PositiveIntegerField()
    is_undone = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-pk"]
        indexes: ClassVar = [models.Index(fields=["edit", "picture"], name="caption_change_of_edit")]

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


class TagList(models.Model):
    """A person's list of tags to choose from, such as a booru's."""

    owner = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    name = models.CharField(max_length=255, help_text="Of the file, as uploaded; shown only.")
    tags = models.TextField(help_text="`tag,count` lines, the most frequent first; see tag_lists.py.")
    tag_count = models.PositiveIntegerField()
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return self.name


class DatasetVersion(models.Model):
    """An immutable list of pictures and captions. A run pins one; it outlives the dataset."""

    dataset = models.ForeignKey(Dataset, null=True, on_delete=models.SET_NULL, related_name="versions")
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    name = models.CharField(max_length=100, help_text="The dataset's name when the version was made.")
    trigger_word = models.CharField(max_length=100, blank=True)
    number = models.PositiveIntegerField()
    digest = models.CharField(max_length=64, help_text="sha256 of the content; see services.version_digest.")
    # [{"sha256", "extension", "width", "height", "bytes", "caption", "repeats", "name"}], sorted by sha256;
    # with "edit" where there is one
    pictures = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-number"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["dataset", "digest"], name="version_once_per_content"),
            models.UniqueConstraint(fields=["dataset", "number"], name="version_number_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"


class Upload(ChunkedUpload):
    """A picture, caption or archive on its way into a dataset. When all bytes are there, a job imports it."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="uploads")
    options = models.JSONField(default=dict, help_text="Choices of the import, and the folders that the file lay in.")

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(name="upload_offset_within_size", condition=Q(offset__lte=models.F("size"))),
        ]


class Captioning(models.Model):
    """An order of automatic captions: who captions which pictures, and how. A job does it, or a run (`run`)."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="captionings")
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    captioner = models.CharField(max_length=10, choices=Captioner.choices)
    model = models.CharField(max_length=200, help_text="Name at the provider, or folder below the models folder.")
    which = models.CharField(max_length=8, choices=Which.choices, default=Which.MISSING)
    overwrite = models.BooleanField(default=False, help_text="Also pictures that have a caption.")
    options = models.JSONField(default=dict, help_text="Checked by datasets.captioning.options.")
    job = models.ForeignKey(Job, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-pk"]
        constraints: ClassVar = [
            models.CheckConstraint(name="captioning_captioner_valid", condition=Q(captioner__in=Captioner.values)),
            models.CheckConstraint(name="captioning_which_valid", condition=Q(which__in=Which.values)),
        ]

    def __str__(self) -> str:
        return f"{self.model}, {self.dataset}"

    @property
    def is_remote(self) -> bool:
        return self.captioner in REMOTE


class CaptionProposal(models.Model):
    """A caption for one picture, beside the one that it has."""

    captioning = models.ForeignKey(Captioning, on_delete=models.CASCADE, related_name="proposals")
    picture = models.ForeignKey(Picture, on_delete=models.CASCADE, related_name="proposals")
    state = models.CharField(max_length=9, choices=Proposal.choices, default=Proposal.WAITING)
    caption = models.TextField(blank=True)
    previous = models.TextField(blank=True, help_text="The picture's caption when this one was made, or was accepted.")
    reason = models.TextField(blank=True, help_text="Why there is none.")
    input_tokens = models.PositiveIntegerField(default=0)
    output_tokens = models.PositiveIntegerField(default=0)

    class Meta:
        ordering: ClassVar = ["pk"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["captioning", "picture"], name="proposal_once_per_picture"),
            models.CheckConstraint(name="proposal_state_valid", condition=Q(state__in=Proposal.values)),
        ]
        indexes: ClassVar = [models.Index(fields=["captioning", "state"], name="proposal_by_state")]

    def __str__(self) -> str:
        return self.caption or self.reason or str(self.state)

    @property
    def differs_since(self) -> bool:
        """The picture's caption is another one than when this was made: accepting it would lose somebody's work."""
        return self.picture.caption != self.previous
