"""One image processor a family: a decoded picture in, patches and their token count out.

Start at `processors.qwen2_vl.Qwen2VLImageProcessor`. Never decodes bytes: that is
`multimodal.image`. Called by `multimodal.chat`.
"""

__all__: list[str] = []
