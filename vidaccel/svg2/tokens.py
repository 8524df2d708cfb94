"""Tells the video tokens of a sequence from those of text and padding."""

from dataclasses import dataclass, replace

import torch

from vidaccel.hosts.spec import HostSpec


@dataclass(frozen=True)
class Tokens:
    """The video and text tokens of a sequence.

    Attributes:
        total: number of tokens.
        start, stop: first and last + 1 of the video tokens; all others are text.
        text_mask: [B, text] bool, false for padding; None where there is none.
    """

    total: int
    start: int
    stop: int
    text_mask: torch.Tensor | None = None

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.stop - self.start

    @property
    def valid(self) -> torch.Tensor | None:
        """[B, total] bool, false for padding; None where there is none."""
        if self.text_mask is None:
            return None
        before, after = self.text_mask[:, : self.start], self.text_mask[:, self.start :]
        video = before.new_ones(len(before), self.video)
        return torch.cat([before, video, after], 1)

    def with_mask(self, valid: torch.Tensor) -> "Tokens":
        """Return the same with the padding of a [B, total] bool mask."""
        text = torch.cat([valid[:, : self.start], valid[:, self.stop :]], 1)
        return replace(self, text_mask=text)


def tokens_of(
    host: HostSpec,
    total: int,
    video_tokens: int,
    mask: torch.Tensor | None,
    video_rows: tuple[int, int] | None = None,
) -> Tokens | None:
    """Tell video from text; None when the mask says more than can be honoured.

    Args:
        host: the row of the model.
        total: number of tokens.
        video_tokens: how many of them are video, where there is text.
        mask: what attention is given, of the kind that the row says.
        video_rows: first and last + 1 of them, where a packed sequence has them in any place.
    """
    if host.tokens == ("video",):
        return Tokens(total, 0, total) if mask is None else None
    start = 0 if host.tokens[0] == "video" else total - video_tokens
    tokens = Tokens(total, *(video_rows or (start, start + video_tokens)))
    if mask is None:
        return tokens
    if host.mask == "none" or mask.dtype != torch.bool or mask.dim() != 4:
        return None
    # What a video token may see is what there is.
    return tokens.with_mask(mask[:, 0, 0])
