"""What the API shows of captions, their edits and tags, and takes for them. Services decide what is valid."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from datasets.caption_operations import LONGEST_TEXT, Kind, Operation
from datasets.models import BulkEdit, CaptionChange, TagList
from datasets.picture_filters import SHOWN, SORTED, PictureFilter
from datasets.quality_forms import ON_OFF
from datasets.selections import Selection


class CaptionChangeSerializer(serializers.ModelSerializer[CaptionChange]):
    actor: Any = serializers.SlugRelatedField(slug_field="username", read_only=True)

    class Meta:
        model = CaptionChange
        fields = ("before", "after", "revision", "actor", "is_undone", "created_at")


class RevisionInput(serializers.Serializer[Any]):
    revision = serializers.IntegerField(required=False, min_value=1, help_text="The one that you saw: 409 if past.")


class CaptionConflictSerializer(serializers.Serializer[Any]):
    detail = serializers.CharField()
    caption = serializers.CharField(help_text="What is there now.")
    revision = serializers.IntegerField(help_text="Send this one to write over it.")
    yours = serializers.CharField(help_text="What was not saved.")


class FilterInput(serializers.Serializer[Any]):
    q = serializers.CharField(required=False, allow_blank=True, help_text="In the caption or the file's name.")
    tag = serializers.CharField(required=False, allow_blank=True, help_text="A whole tag.")
    show = serializers.ChoiceField(choices=list(SHOWN), required=False, allow_blank=True)
    below = serializers.IntegerField(required=False, min_value=0, help_text="A side has fewer pixels.")
    sort = serializers.ChoiceField(choices=list(SORTED), required=False, allow_blank=True)
    bucket = serializers.CharField(
        required=False, allow_blank=True, help_text="Where the trainer puts it, as in 832x1216; dropped: left out."
    )
    resolution = serializers.IntegerField(required=False, help_text="Of the bucket; 1024 when left out.")
    buckets = serializers.ChoiceField(choices=ON_OFF, required=False, help_text="off: everything is a square.")
    upscale = serializers.ChoiceField(choices=ON_OFF, required=False, help_text="off: nothing is enlarged.")
    minimum = serializers.IntegerField(required=False, help_text="Shortest side of a bucket.")
    maximum = serializers.IntegerField(required=False, help_text="Longest side of a bucket.")
    step = serializers.IntegerField(required=False, help_text="Sides of buckets are multiples of it.")


class SelectionInput(serializers.Serializer[Any]):
    """`pictures`, or `filter` ({}: all pictures)."""

    pictures = serializers.ListField(child=serializers.IntegerField(min_value=1), required=False)
    filter = FilterInput(required=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("pictures" in attrs) == ("filter" in attrs):
            raise serializers.ValidationError("Send either pictures or filter.")
        return attrs

    def selection(self) -> Selection:
        given = self.validated_data
        if "pictures" in given:
            return Selection.of(given["pictures"])
        return Selection(None, PictureFilter.from_query({name: str(value) for name, value in given["filter"].items()}))


class EditInput(SelectionInput):
    kind = serializers.CharField(help_text=f"One of {', '.join(Kind.values)}.")
    text = serializers.CharField(
        required=False, allow_blank=True, trim_whitespace=False, max_length=LONGEST_TEXT, default=""
    )
    replacement = serializers.CharField(
        required=False, allow_blank=True, trim_whitespace=False, max_length=LONGEST_TEXT, default=""
    )
    at_start = serializers.BooleanField(required=False, default=False)

    def operation(self) -> Operation:
        given = self.validated_data
        return Operation(given["kind"], given["text"], given["replacement"], given["at_start"])


class ApplyInput(EditInput):
    fingerprint = serializers.CharField(
        required=False, allow_blank=True, default="", help_text="Of a preview: 409 when the captions changed since."
    )


class PlannedChange(serializers.Serializer[Any]):
    id = serializers.IntegerField(source="picture_id")
    name = serializers.CharField()
    before = serializers.CharField()
    after = serializers.CharField()


class PlanSerializer(serializers.Serializer[Any]):
    selected = serializers.IntegerField(source="selected_count")
    changed = serializers.SerializerMethodField(help_text="How many captions would change.")
    changes = PlannedChange(source="shown", many=True, help_text="The first 50.")
    fingerprint = serializers.CharField()

    def get_changed(self, plan: Any) -> int:
        return len(plan.changes)


class BulkEditSerializer(serializers.ModelSerializer[BulkEdit]):
    actor: Any = serializers.SlugRelatedField(slug_field="username", read_only=True)

    class Meta:
        model = BulkEdit
        fields = ("id", "label", "picture_count", "actor", "created_at", "undone_at")


class AppliedSerializer(serializers.Serializer[Any]):
    changed = serializers.IntegerField()
    left_alone = serializers.IntegerField(help_text="Captions that somebody else changed meanwhile.")
    edit = BulkEditSerializer(allow_null=True)


class UndoneSerializer(serializers.Serializer[Any]):
    back = serializers.IntegerField(help_text="Captions, or pictures, that are back.")
    left_alone = serializers.IntegerField(help_text="Those that were changed meanwhile, or cannot come back.")


class TagSerializer(serializers.Serializer[Any]):
    tag = serializers.CharField()
    count = serializers.IntegerField()
    is_own = serializers.BooleanField(help_text="From your own list, not from the dataset.")


class TagsSerializer(serializers.Serializer[Any]):
    results = TagSerializer(many=True)


class TriggerSerializer(serializers.Serializer[Any]):
    trigger_word = serializers.CharField()
    missing = serializers.IntegerField(help_text="Captions without it.")
    leaking = serializers.IntegerField(help_text="Captions with it inside another word, or with a foreign one.")
    foreign = serializers.ListField(child=serializers.CharField(), help_text="Trigger words of other datasets.")
    sample_prompts = serializers.ListField(child=serializers.CharField())


class TagListSerializer(serializers.ModelSerializer[TagList]):
    class Meta:
        model = TagList
        fields = ("name", "tag_count", "updated_at")


class TagListInput(serializers.Serializer[Any]):
    file = serializers.FileField(allow_empty_file=True, help_text="Lines `tag` or `tag,count`.")
