"""What another process, here or on another machine, needs to open the same study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import StudentConfig, TeacherConfig
from store.mirror import Mirror, attach_again, attached
from store.mirror_folder import MirrorFolder, use_mirror, used_mirror
from train.study import Study, open_study
from train.windows import Feed


@dataclass(frozen=True)
class Recipe:
    """Of one study, whose runs it trains on as many views as this process does."""

    config: StudentConfig
    teacher: TeacherConfig
    cache_path: Path
    runs_dir: Path
    feed: Feed
    mirrors: dict[Path, Mirror]
    mirror: MirrorFolder

    @classmethod
    def of(cls, study: Study) -> Recipe:
        config = replace(study.config, num_views=study.num_views)
        path, mirrors = study.cache.path, attached()
        return cls(config, study.teacher, path, study.runs_dir, study.feed, mirrors, used_mirror())

    def opened(self) -> Study:
        attach_again(self.mirrors)
        use_mirror(self.mirror)
        return open_study(
            self.config,
            self.teacher,
            caches_dir=self.cache_path.parent,
            runs_dir=self.runs_dir,
            cache_path=self.cache_path,
            feed=self.feed,
        )
