"""The conformance suite: what every backbone must do, checked on one model.

An adapter is right when a model with registers behaves as the same model without them, wherever registers
are not meant to be seen. Each law of phreg that a single model can show is one short function in `laws`;
`check_backbone` runs them all on copies of the model and names the law that broke, and how.

    model ──copy──► original ─┐
          ──copy──► patched  ─┴─► native outputs: equal shapes always, equal values with registers masked

It says nothing about trained models, about exports or about speed.
"""

from phreg.testing.conformance import check_backbone as check_backbone
from phreg.testing.instruments import native_outputs as native_outputs
from phreg.testing.instruments import registers_masked as registers_masked
from phreg.testing.subject import DenseReader as DenseReader
from phreg.testing.subject import Subject as Subject
