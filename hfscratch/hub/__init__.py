"""Cards for, and uploads to, the Hugging Face Hub.

    text = card.make_card(...)                          # a README.md that the Hub's own parser accepts
    files = [upload.Outgoing("README.md", text.encode()), ...]
    with upload.hub_errors(repo_id):
        done = upload.send(files, repo_id, is_private=True, message="Upload")

Downloads are not covered: `from_pretrained` does them.
"""
