"""Tiny films in files of several kinds, from which every pixel can be read back."""

import av
from tiny_vision import film


# without loss, in containers that say how many frames they hold and in such that do not
CODECS = {"mkv": ("ffv1", "bgr0"), "avi": ("png", "rgb24"), "mp4": ("libx264rgb", "rgb24")}
FRAMES = film(1, 24)


def write_film(path, frames=FRAMES, fps=12, cut=0):
    """Frames `(frames, height, width, 3)` as a file of the kind that its name says; returns its path as text.

    The first `cut` of them are there but not shown, as where a film was trimmed without being encoded again (mp4).
    """
    codec, pixels = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps, options={"qp": "0"} if codec == "libx264rgb" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        pictures = [av.VideoFrame.from_ndarray(x, format="rgb24").reformat(format=pixels) for x in frames]
        for packet in [packet for picture in (*pictures, None) for packet in stream.encode(picture)]:
            if cut:
                earlier = round(cut / fps / packet.time_base)
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
            file.mux(packet)
    return str(path)
