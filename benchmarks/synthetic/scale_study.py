"""A study of an image folder of any size, with a complete cache whose records are made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.synthetic.caches import fill_with_noise
from benchmarks.synthetic.photographs import photograph_folder
from benchmarks.synthetic.studies import save_random_weights
from teach_once.configs.load import load_student, load_teacher
from teach_once.precompute.compute.setup import Setup, prepare
from teach_once.train.runs.study import Study, open_study

CLASSES = 1000
CHANNELS = 16  # of the one stage that is stored
TEACHER = """
dataset:
  type: imagefolder
  root: {folder}/tree
  normalization: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
views: {{augment: {{type: random-resized-crop, size_px: 32{mix}}}, count: {views}}}
teacher: {{arch: resnet8, weights: {folder}/teacher.pt}}
taps: {{logits: null, channel_means: uint8, stages: [layer1]}}
"""
STUDENT = """
teacher: {folder}/scale-teacher.yaml
student: {{arch: resnet8, stages: [layer1]}}
training: {{epochs: 4, batch_size: 128, learning_rate: 0.1, schedule: {{type: onecycle}}}}
methods: {{cd: [{{loss: ce}}, {{loss: cd}}]}}
"""


@dataclass(frozen=True)
class ScaleStudy:
    """The files of one size, in `folder`."""

    folder: Path
    num_samples: int
    num_views: int

    @property
    def caches(self) -> Path:
        return self.folder / "caches"

    @property
    def teacher(self) -> str:
        return str(self.folder / "scale-teacher.yaml")

    @property
    def student(self) -> str:
        return str(self.folder / "scale-student.yaml")

    def setup(self, mixes: bool = False) -> Setup:
        mixing = str(self.folder / "scale-mixing.yaml")
        return prepare(mixing if mixes else self.teacher, [], self.caches)

    def study(self) -> Study:
        student, teacher = load_student(self.student, []), load_teacher(self.teacher, [])
        runs = self.folder / "runs"
        return open_study(student, teacher, caches_dir=self.caches, runs_dir=runs)


def make_study(folder: Path, num_samples: int, num_views: int, contents: list[bytes]) -> ScaleStudy:
    """The tree, the configs, the weights of a teacher, and its cache."""
    folder.mkdir()
    digests = photograph_folder(folder / "tree", num_samples, contents, CLASSES)
    save_random_weights(folder / "teacher.pt", "resnet8", CLASSES)
    for name, mix in (("teacher", ""), ("mixing", ", mix: {type: mixup}")):
        text = TEACHER.format(folder=folder, views=num_views, mix=mix)
        (folder / f"scale-{name}.yaml").write_text(text)
    (folder / "scale-student.yaml").write_text(STUDENT.format(folder=folder))
    study = ScaleStudy(folder, num_samples, num_views)
    fill_with_noise(study.setup(), lambda ids: digests[ids])
    return study
