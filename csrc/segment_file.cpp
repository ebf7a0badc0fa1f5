#include "segment_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "charges.hpp"

namespace kvcached {

namespace {

using layout::Header;
using layout::Identity;
using layout::Shared;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

Status ledger_error(const std::string& path, const std::string& what) {
  return {Code::kLedger, path + ": " + what};
}

Status system_error(const std::string& path, const char* what, int error) {
  return ledger_error(path, std::string(what) + ": " + std::strerror(error));
}

std::string versions(uint32_t found) {
  return "layout version " + std::to_string(found) + ", this program's " +
         std::to_string(layout::kVersion);
}

uint64_t fnv1a(const std::string& text) {
  uint64_t hash = 1469598103934665603u;
  for (unsigned char c : text) hash = (hash ^ c) * 1099511628211u;
  return hash;
}

Status open_directory(const OpenRequest& request, std::string path, int* fd) {
  const bool make = request.create && !request.read_only;
  if (make && mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return system_error(path, "cannot create the ledger's folder", errno);
  }
  *fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (*fd < 0) return system_error(path, "cannot open the ledger's folder", errno);
  struct stat info{};
  if (fstat(*fd, &info) != 0) return system_error(path, "cannot read its owner", errno);
  if (request.read_only) return Status::ok();
  if (info.st_uid != geteuid()) {
    return ledger_error(path, "this folder belongs to user " + std::to_string(info.st_uid) +
                                  ", not to user " + std::to_string(geteuid()));
  }
  if ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return ledger_error(path, "other users may write to this folder (chmod go-w)");
  }
  return Status::ok();
}

// Writes a whole new ledger under a name of its own, then links it to its real name: nobody ever
// sees half of one, and of several creators one wins.
Status create_file(const OpenRequest& request, int directory, const std::string& name,
                   const std::string& path) {
  if (request.capacity_bytes < 0) {
    return ledger_error(path, "there is no ledger yet, and no capacity was named to create one");
  }
  auto header = std::make_unique<Header>();
  Identity& identity = header->identity;
  std::memcpy(identity.magic, layout::kMagic, sizeof identity.magic);
  identity.version = layout::kVersion;
  identity.header_size = sizeof(Header);
  identity.total_size = sizeof(Shared);
  if (getrandom(identity.nonce, sizeof identity.nonce, 0) != sizeof identity.nonce) {
    return system_error(path, "no random number", errno);
  }
  std::memcpy(identity.device, request.device.data(), request.device.size());
  header->settings.capacity = request.capacity_bytes;
  header->settings.headroom = request.headroom_bytes;
  header->version.version = 1;

  char unique[40];
  std::snprintf(unique, sizeof unique, ".%016llx.new",
                static_cast<unsigned long long>(identity.nonce[0]));
  std::string temporary = "." + name + unique;
  Descriptor file(openat(directory, temporary.c_str(),
                         O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (file.get() < 0) return system_error(path, "cannot create the ledger", errno);
  // All of it is allocated now: a full file system is an error here and not a SIGBUS later.
  int error = posix_fallocate(file.get(), 0, sizeof(Shared));
  const ssize_t size = sizeof(Header);
  if (error == 0 && pwrite(file.get(), header.get(), size, 0) != size) error = EIO;
  if (error == 0 && linkat(directory, temporary.c_str(), directory, name.c_str(), 0) != 0 &&
      errno != EEXIST) {
    error = errno;
  }
  unlinkat(directory, temporary.c_str(), 0);
  if (error != 0) return system_error(path, "cannot create the ledger", error);
  return Status::ok();
}

Status check_file(const OpenRequest& request, int fd, const std::string& path) {
  struct stat info{};
  if (fstat(fd, &info) != 0) return system_error(path, "cannot read its size", errno);
  if (!S_ISREG(info.st_mode)) return ledger_error(path, "this is not a regular file");
  if (!request.read_only && info.st_uid != geteuid()) {
    return ledger_error(path, "this file belongs to user " + std::to_string(info.st_uid) +
                                  ", not to user " + std::to_string(geteuid()));
  }
  if (!request.read_only && (info.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return ledger_error(path, "other users may write to this file (chmod go-w)");
  }
  Identity identity{};
  ssize_t got = pread(fd, &identity, sizeof identity, 0);
  if (got < static_cast<ssize_t>(offsetof(Identity, header_size)) ||
      std::memcmp(identity.magic, layout::kMagic, sizeof identity.magic) != 0) {
    return ledger_error(path, "this is not a ledger of kvcached (" + std::to_string(info.st_size) +
                                  " bytes; expected layout version " +
                                  std::to_string(layout::kVersion) + ")");
  }
  if (identity.version != layout::kVersion) {
    return ledger_error(path, "this ledger has another layout: " + versions(identity.version) +
                                  "; stop the processes that use it, then delete the file");
  }
  if (got != sizeof identity || identity.header_size != sizeof(Header) ||
      identity.total_size != sizeof(Shared) || info.st_size != static_cast<off_t>(sizeof(Shared))) {
    return ledger_error(path, "this ledger is cut or damaged: " + std::to_string(info.st_size) +
                                  " bytes instead of " + std::to_string(sizeof(Shared)) + " (" +
                                  versions(identity.version) + ")");
  }
  std::string device(identity.device, strnlen(identity.device, layout::kDeviceSize));
  if (device != request.device) {
    return ledger_error(
        path, "this is the ledger of device '" + device + "', not of '" + request.device + "'");
  }
  return Status::ok();
}

Status check_request(const OpenRequest& request) {
  if (request.device.empty() || request.device.size() >= layout::kDeviceSize ||
      request.device.find('\0') != std::string::npos) {
    return {Code::kInvalidArgument, "device '" + request.device + "': expected 1 to " +
                                        std::to_string(layout::kDeviceSize - 1) + " bytes"};
  }
  if (request.capacity_bytes == 0 || request.headroom_bytes < 0 ||
      request.capacity_bytes > charges::kMostBytes ||
      (request.capacity_bytes > 0 && request.headroom_bytes >= request.capacity_bytes)) {
    return {Code::kInvalidArgument,
            "capacity " + std::to_string(request.capacity_bytes) + " bytes with headroom " +
                std::to_string(request.headroom_bytes) + " bytes leaves nothing to lease"};
  }
  return Status::ok();
}

}  // namespace

std::string ledger_file_name(const std::string& device) {
  std::string slug;
  bool exact = true;
  bool colon_seen = false;
  for (char c : device) {
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (letter || c == '-' || c == '.' || c == '_') {
      slug += c;
      continue;
    }
    // The colon after a kind in small letters (host:demo) is the one character with a spelling.
    bool kind = c == ':' && !colon_seen && !slug.empty() &&
                slug.find_first_not_of("abcdefghijklmnopqrstuvwxyz") == std::string::npos;
    colon_seen = colon_seen || c == ':';
    if (!kind) exact = false;
    slug += '-';
  }
  // Without a kind, a name that reads like one (host-demo) must not meet it.
  size_t dash = slug.find('-');
  bool like_kind =
      dash != std::string::npos && dash != 0 &&
      slug.substr(0, dash).find_first_not_of("abcdefghijklmnopqrstuvwxyz") == std::string::npos;
  if (!colon_seen && like_kind) exact = false;
  if (!exact) {
    char hash[20];
    std::snprintf(hash, sizeof hash, "-%016llx", static_cast<unsigned long long>(fnv1a(device)));
    slug += hash;
  }
  return "ledger-" + slug;
}

FileMapping::~FileMapping() {
  if (shared_ != nullptr) munmap(shared_, sizeof(Shared));
}

int FileMapping::map(int fd, bool writable) {
  int protection = PROT_READ | (writable ? PROT_WRITE : 0);
  void* address = mmap(nullptr, sizeof(Shared), protection, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) return errno;
  shared_ = static_cast<Shared*>(address);
  return madvise(address, sizeof(Shared), MADV_DONTFORK) == 0 ? 0 : errno;
}

Status check_not_cut(int fd, const std::string& path) {
  struct stat info{};
  if (fstat(fd, &info) == 0 && info.st_size == static_cast<off_t>(sizeof(Shared))) {
    return Status::ok();
  }
  return ledger_error(path, "this ledger was cut while in use: " + std::to_string(info.st_size) +
                                " bytes instead of " + std::to_string(sizeof(Shared)) + " (" +
                                versions(layout::kVersion) + ")");
}

Status open_ledger_file(const OpenRequest& request, Liveness& liveness, FileMapping& mapping) {
  if (Status status = check_request(request); !status) return status;
  std::string folder = request.directory;
  while (folder.size() > 1 && folder.back() == '/') folder.pop_back();  // it would follow a link
  const std::string name = ledger_file_name(request.device);
  const std::string path = folder + "/" + name;

  int directory_fd = -1;
  Status status = open_directory(request, folder, &directory_fd);
  Descriptor directory(directory_fd);
  if (!status) return status;

  const bool writable = !request.read_only;
  for (int attempt = 0; attempt < 16; ++attempt) {
    int error = liveness.open(directory_fd, name.c_str(), writable);
    if (error == ENOENT && request.create && writable) {
      status = create_file(request, directory_fd, name, path);
      if (!status) return status;
      continue;
    }
    if (error == ENOENT) return ledger_error(path, "there is no ledger here");
    if (error == ELOOP) return ledger_error(path, "this is a symbolic link");
    if (error != 0) return system_error(path, "cannot open the ledger", error);
    if (status = check_file(request, liveness.fd(), path); !status) return status;
    int flags = (writable ? O_RDWR : O_RDONLY) | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    Descriptor data(openat(directory_fd, name.c_str(), flags));
    struct stat locked{};
    struct stat mapped{};
    // The two descriptors must be of one file: it may have been replaced between the two opens.
    if (data.get() >= 0 && fstat(liveness.fd(), &locked) == 0 && fstat(data.get(), &mapped) == 0 &&
        locked.st_ino == mapped.st_ino && locked.st_dev == mapped.st_dev) {
      error = mapping.map(data.get(), writable);
      if (error != 0) return system_error(path, "cannot map the ledger", error);
      return Status::ok();
    }
    liveness.close();
  }
  return ledger_error(path, "this file is being replaced again and again");
}

Status remove_ledger_file(const std::string& folder, const std::string& device) {
  OpenRequest request{folder, device, -1, 0, false, false};
  if (Status status = check_request(request); !status) return status;
  const std::string name = ledger_file_name(device);
  const std::string path = folder + "/" + name;
  int directory_fd = -1;
  Status status = open_directory(request, folder, &directory_fd);
  Descriptor directory(directory_fd);
  if (!status) return status;
  Descriptor file(
      openat(directory_fd, name.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (file.get() < 0 && errno == ENOENT) return ledger_error(path, "there is no ledger here");
  if (file.get() < 0) return system_error(path, "cannot open the ledger", errno);
  char magic[sizeof layout::kMagic] = {};
  if (pread(file.get(), magic, sizeof magic, 0) != static_cast<ssize_t>(sizeof magic) ||
      std::memcmp(magic, layout::kMagic, sizeof magic) != 0) {
    return ledger_error(path, "this is not a ledger of kvcached: it is left alone");
  }
  // All bytes at once: whoever may write to the ledger, in any version, holds one of them.
  struct flock all{};
  all.l_type = F_WRLCK;
  all.l_whence = SEEK_SET;
  if (fcntl(file.get(), F_OFD_SETLK, &all) != 0) {
    return {Code::kInvalidArgument, path + ": processes that live have this ledger open"};
  }
  struct stat locked{};
  struct stat named{};
  // Who opens it meanwhile finds after taking a lock that the file has lost its name.
  if (fstat(file.get(), &locked) != 0 ||
      fstatat(directory_fd, name.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0 ||
      locked.st_ino != named.st_ino || locked.st_dev != named.st_dev) {
    return ledger_error(path, "this file is being replaced");
  }
  if (unlinkat(directory_fd, name.c_str(), 0) != 0) {
    return system_error(path, "cannot remove the ledger", errno);
  }
  return Status::ok();
}

}  // namespace kvcached
