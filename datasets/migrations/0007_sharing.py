"""Groups that may change a dataset, beside those that look."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("auth", "0012_alter_user_first_name_max_length"),
        ("datasets", "0006_captioning"),
    ]

    operations = [
        migrations.AddField(
            model_name="dataset",
            name="editor_groups",
            field=models.ManyToManyField(
                blank=True,
                help_text="Of those groups, these can also change it.",
                related_name="+",
                to="auth.group",
            ),
        ),
    ]
