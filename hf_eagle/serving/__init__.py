"""How servers read and run a draft: its folder, the rules of vLLM and SGLang, a probe, repair, and speed."""
