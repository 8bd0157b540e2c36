"""What the multimodal LLM is asked, in words (paper section 3, and the authors' released code)."""

import re

#: Where an instruction has its picture.
PICTURE = "<image>"
#: The instruction's wording. The released code reads the output at its last word, `*`, and has no token of its own.
TEMPLATES = {
    "paper": "<image>\nAn image of {label}. Describe {prompt}",
    "released": "USER: <image>\n A photo of a {label}. Describe a new image of the same {label} in: {prompt}. ASSISTANT: *",
}


def instruction(template: str, label: str, prompt: str) -> str:
    """The words the MLLM reads, with one `<image>` in them. A label's article and a prompt's final period are left out."""
    label = re.sub(r"^(a|an|the)\s+", "", label.strip(), flags=re.IGNORECASE)
    return TEMPLATES[template].format(label=label, prompt=prompt.strip().removesuffix(".").rstrip())
