// Logs on disk: TensorBoard event files and CSV tables. Both are append-only and flushed line by line, so that a killed
// run loses nothing that it had logged.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace capo::train {

// CRC-32C (Castagnoli), as TFRecord uses it: crc32c("123456789") = 0xE3069283.
std::uint32_t crc32c(std::string_view data);
// One TFRecord: length, masked CRC of the length, data, masked CRC of the data.
std::string tf_record(std::string_view data);

// Scalars for TensorBoard: one file events.out.tfevents.<time>.<host>.<pid>.<n> per writer, in `dir` (made if missing).
class TensorBoard {
 public:
  // resume_step >= 0: tells the reader to drop what earlier files hold beyond it.
  explicit TensorBoard(const std::string& dir, std::int64_t resume_step = -1);
  ~TensorBoard();
  TensorBoard(const TensorBoard&) = delete;
  TensorBoard& operator=(const TensorBoard&) = delete;

  void scalar(std::string_view tag, std::int64_t step, double value);
  const std::string& path() const { return path_; }

 private:
  void append(const std::string& event);
  std::string path_;
  int fd_ = -1;
};

// A CSV table whose first column is the step.
class CsvLog {
 public:
  // rows < 0: a new table (an old file is replaced). Otherwise goes on with the file: keeps its first `rows` rows, of
  // those only the ones with step <= last_step, and cuts off the rest. Throws when the file's header is another one.
  CsvLog(const std::string& path, const std::string& header, std::int64_t rows = -1, std::int64_t last_step = 0);
  ~CsvLog();
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;

  // line: without a newline.
  void row(const std::string& line);
  std::int64_t rows() const { return rows_; }

 private:
  std::string path_;
  int fd_ = -1;
  std::int64_t rows_ = 0;
};

}  // namespace capo::train
