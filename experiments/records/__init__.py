"""What trainings leave behind: its format, written and read. Knows neither torch nor what made the numbers."""

from experiments.records.directory import OtherRecordError, RecordDirectory, RecordInUseError, Row
from experiments.records.files import PAPER, NoRecordsError, RecordError, seed_directory
from experiments.records.measurements import PCG_LIMIT, load_measurement
from experiments.records.record import Record, load_record, shared_settings
from experiments.records.runs import FINAL_EPOCHS, FULL_BATCH_LOSS, Run, find_runs, load_runs
