"""What servers make of a draft: its folder, the rules of vLLM and SGLang, a probe, repair, and speed."""
