"""The model libraries' own tests, run on models that phreg patched.

    python -m tests.suites timm|peft|open_clip|transformers

    source distribution ──pip──► tests ──pytest, thrice──► outcomes ──comparison──► table, verdict
                                   │ stock │ patched │ removed                ▲
                                   plugin: a constructor's model gets registers   expected.toml

`library` says where each library's tests are, `sources` fetches them, `construction` and `plugin` patch what
tests construct, `runner` runs them, `comparison` judges. README.md shows the last results.
"""
