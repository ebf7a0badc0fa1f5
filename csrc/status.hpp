// The outcome of an operation of the core. C++ returns it; only the bindings raise.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace kvcached {

enum class Code : int32_t {
  kOk = 0,
  kOutOfMemory,      // the device has no memory for a page; the caller may reclaim and retry
  kInvalidArgument,  // the caller named a block, page or size that does not fit
  kDriver,           // the driver or kernel refused for another reason
  kUnavailable,      // no driver, no device, or no virtual memory management here
  kLedger,           // the ledger file is cut, foreign or of another version
  kBusy,             // a live process holds the ledger's lock and does not let go
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status ok() { return {}; }
  bool is_ok() const { return code_ == Code::kOk; }
  explicit operator bool() const { return is_ok(); }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

}  // namespace kvcached
