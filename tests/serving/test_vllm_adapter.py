"""A draft that LoRA was trained on, in a real vLLM: a checkpoint is served as it lies there, adapter and all."""

import harness


def test_a_checkpoint_of_an_adapter_is_served(measured_draft, answers, prompts_file, tmp_path):
    base, of_base, _ = measured_draft("eagle3")
    lora = {"init_from": base, "use_peft": True, "lora_r": 8, "draft_vocab_size": 512, "max_steps": 8}
    saved = {"save_strategy": "steps", "save_steps": 8}
    run = harness.train(tmp_path / "lora", answers["train_data"], **lora, **saved)
    checkpoint = run / "checkpoint-8"
    assert (checkpoint / "adapter" / "adapter_model.safetensors").exists()
    measured, tokens = harness.measure(tmp_path, checkpoint, prompts_file, compare_to_target=False, batch_size=12)
    served = harness.serve(tmp_path, answers["prompt_token_ids"], checkpoint)

    assert [entry["token_ids"] for entry in tokens] == served["token_ids"] == answers["token_ids"]
    harness.assert_counts_equal(served, measured)
    # the adapter does something, and nothing bad: counts of the base would not do
    assert measured["accepted_per_position"] != of_base["accepted_per_position"]
    assert measured["accepted_tokens"] > 0.9 * of_base["accepted_tokens"]
