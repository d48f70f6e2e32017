"""The public verbs, each composed of the modules of the method.

    distillation   resolve ► load ► add registers ► train ► compare ► adapter, card, report
    loading        adapter ► base ► patched model of its ordinary class
    publishing     patched model ► another library's format, or the hub
    training_free  averages over views, and test-time registers
    inspection     model ► artifacts, their causes, what they hold
    evaluation     models ► figures of a task, side by side

Each module describes its own work. Here is only the order. `phreg.__init__` lists what is public.
"""

from phreg.api.arguments import ImagesPath as ImagesPath
from phreg.api.distillation import Distilled as Distilled
from phreg.api.distillation import StepObserver as StepObserver
from phreg.api.distillation import distill as distill
from phreg.api.distillation import quickstart as quickstart
from phreg.api.evaluation import evaluate as evaluate
from phreg.api.inspection import inspect as inspect
from phreg.api.loading import load as load
from phreg.api.publishing import Pushed as Pushed
from phreg.api.publishing import export as export
from phreg.api.publishing import push as push
from phreg.api.training_free import add_test_time_registers as add_test_time_registers
from phreg.api.training_free import denoise as denoise
from phreg.formats.load import Model as Model
from phreg.formats.load import open_model as open_model
