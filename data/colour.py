"""Which colours an untagged video has: one rule, for what is read and for what is written."""

from __future__ import annotations

BT709 = 1
"""AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709 of FFmpeg, and swscale's SWS_CS_ITU709."""

BT601 = 6
"""AVCOL_SPC_SMPTE170M of FFmpeg: the matrix of BT.601."""


def matrix_of(height: int, width: int) -> int:
    """The YUV matrix that players assume for an untagged video of this size in stored pixels, BT709 or BT601.

    Source: mpv, mp_csp_guess_colorspace, HD begins at 1280 columns or above the 576 lines of PAL.
    """
    return BT709 if width >= 1280 or height > 576 else BT601
