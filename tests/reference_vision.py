"""The loop reference of `reference.py` for conversations with images and videos, each looked at alone."""

import torch
from reference import ReferenceDraft, reference_loss, rope
from test_vision_target import inputs_of_layers
from tiny_vision import processed


class VisionReference(ReferenceDraft):
    """Rows stand where the model's own `get_rope_index` puts them, if the draft goes by axes.

    `shown`, place -> vector, is what stands in the place of a token's embedding.
    """

    def unroll(self, ids, taps, row, steps):
        return super().unroll([self.shown.get(place, token) for place, token in enumerate(ids)], taps, row, steps)

    def embedding(self, token):
        return token if isinstance(token, torch.Tensor) else super().embedding(token)

    def place(self, row, step):
        return row + step if self.c.mrope_section is None else [int(axis[row]) + step for axis in self.positions]

    def rotate(self, x, position):
        if self.c.mrope_section is None:
            told = self.c.rope_parameters
            return rope(x, position / (told["factor"] if told["rope_type"] == "linear" else 1), self.theta)
        by_axis, half = [rope(x, p, self.theta) for p in position], x.shape[-1] // 2
        section, mixed = self.c.mrope_section, x.clone()
        for pair in range(half):
            if self.c.rope_parameters["mrope_interleaved"]:
                axis = pair % 3 if pair < 3 * section[pair % 3] else 0
            else:
                axis = 0 if pair < section[0] else 1 if pair < section[0] + section[1] else 2
            for place in (pair, pair + half):
                mixed[:, place] = by_axis[axis][:, place]
        return mixed


def vision_loss(draft, model, processor, chats, rows, steps, **options):
    """As `reference_loss`, of `rows` with `input_ids` and `loss_mask` that belong to `chats`."""

    def look(reference, record):
        batch = {name: x.to(model.device) for name, x in processed(processor, [record["chat"]]).items()}
        assert batch["input_ids"][0].tolist() == record["input_ids"]
        inputs, logits = inputs_of_layers(model, batch)
        asked = {name: x for name, x in batch.items() if not name.startswith("pixel")}
        if draft.config.mrope_section is not None:
            reference.positions = model.model.get_rope_index(**asked)[0][:, 0]
        reference.shown = seen_media(model, batch) if draft.config.image_embeddings == "vision" else {}
        return torch.cat([inputs[i][0] for i in draft.config.tap_ids], -1), logits[0]

    records = [{**row, "chat": chat} for row, chat in zip(rows, chats, strict=True)]
    return reference_loss(draft, model, records, steps, reference=VisionReference, look=look, **options)


@torch.no_grad()
def seen_media(model, batch) -> dict[int, torch.Tensor]:
    """What the vision tower makes of a conversation's media, by the places of their tokens."""
    found = {}
    for kind, pixels, look in (
        ("image", "pixel_values", model.model.get_image_features),
        ("video", "pixel_values_videos", model.model.get_video_features),
    ):
        if pixels in batch:
            vectors = torch.cat(list(look(batch[pixels], batch[f"{kind}_grid_thw"]).pooler_output))
            places = (batch["input_ids"][0] == getattr(model.config, f"{kind}_token_id")).nonzero()[:, 0].tolist()
            found |= dict(zip(places, vectors, strict=True))
    return found
