// engine/files and engine/sha256.
#include <capo/engine/sha256.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cstring>

using namespace capo;
using namespace capo::testing;

TEST_CASE("files: read and write round trip") {
  const TempFolder t;
  const std::string content("a\0b\nc", 5);
  write_file_atomic(t / "x", content);
  CHECK(read_file(t / "x", 5) == content);
  CHECK(t.entries() == 1);  // no temporary left
  write_file_atomic(t / "x", std::string());
  CHECK(read_file(t / "x", 100).empty());
  CHECK(MappedFile(t / "x").size() == 0);
  write_file_atomic(t / "x", content.data(), content.size());
  const MappedFile map(t / "x");
  REQUIRE(map.size() == 5);
  CHECK(std::memcmp(map.data(), content.data(), 5) == 0);
}

TEST_CASE("files: errors start with the path") {
  const TempFolder t;
  const std::string p = t.file("x", "12345");
  CHECK(error_of([&] { read_file(p, 4); }) == p + ": too long, at most 4 bytes are accepted, got 5");
  CHECK(error_of([&] { read_file(t / "none", 4); }) ==
        t / "none" + ": cannot open the file, No such file or directory");
  CHECK(error_of([&] { read_file(t.path(), 4); }) == t.path() + ": must be a regular file, got a folder");
  CHECK(error_of([&] { MappedFile m(t.path()); }) == t.path() + ": must be a regular file, got a folder");
  CHECK(contains(error_of([&] { read_file("/dev/null", 4); }), "special file"));
  REQUIRE(::mkfifo((t / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error_of([&] { read_file(t / "pipe", 4); }), "special file"));  // and does not wait
  const InputFile f(p);
  char buffer[8];
  CHECK(starts_with(error_of([&] { f.read_at(3, buffer, 3); }), p + ": read past the end"));
  CHECK(starts_with(error_of([&] { f.read_at(~0ull, buffer, 3); }), p + ": read past the end"));
  REQUIRE(::truncate(p.c_str(), 2) == 0);
  CHECK(starts_with(error_of([&] { f.read_at(0, buffer, 5); }), p + ": truncated after it was opened"));
}

TEST_CASE("files: a replaced file keeps its permissions, a new one follows the umask") {
  const TempFolder t;
  const auto mode_of = [](const std::string& path) {
    struct stat st {};
    return ::stat(path.c_str(), &st) == 0 ? st.st_mode & 07777 : 0;
  };
  const mode_t before = ::umask(027);
  const std::string p = t.file("x", "old");
  CHECK(mode_of(p) == 0640);
  for (const mode_t mode : {0600, 0666, 0755, 0444}) {
    REQUIRE(::chmod(p.c_str(), mode) == 0);
    {
      AtomicFile f(p);
      f.write("new");
      for (const auto& e : std::filesystem::directory_iterator(t.path()))  // nor can others read the temporary
        CHECK(mode_of(e.path().string()) == mode);
      f.commit();
    }
    CHECK(mode_of(p) == mode);
  }
  ::umask(before);
  CHECK(read_file(p, 100) == "new");
}

TEST_CASE("files: a failed write leaves the old file and no temporary") {
  const TempFolder t;
  const std::string p = t.file("x", "old");
  SUBCASE("never committed") {
    { AtomicFile f(p); f.write("new"); }
  }
  SUBCASE("no room: the size limit of the process") {
    struct rlimit old {};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
    auto* handler = ::signal(SIGXFSZ, SIG_IGN);
    struct rlimit small = old;
    small.rlim_cur = 4096;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    const std::string text = error_of([&] { write_file_atomic(p, std::string(10000, 'n')); });
    ::setrlimit(RLIMIT_FSIZE, &old);
    ::signal(SIGXFSZ, handler);
    CHECK(text == p + ": cannot write after 4096 bytes, File too large");
  }
  SUBCASE("target turns into a folder") {
    AtomicFile f(t / "y");
    f.write("new");
    REQUIRE(::mkdir((t / "y").c_str(), 0700) == 0);
    CHECK(starts_with(error_of([&] { f.commit(); }), t / "y" + ": cannot rename"));
    REQUIRE(::rmdir((t / "y").c_str()) == 0);
    CHECK(contains(error_of([&] { f.write("more"); }), "write after commit or failure"));
  }
  SUBCASE("no such folder") {
    CHECK(starts_with(error_of([&] { AtomicFile f(t / "none/x"); }), t / "none/x" + ": cannot create"));
  }
  SUBCASE("target is a folder") {
    CHECK(contains(error_of([&] { AtomicFile f(t.path()); }), "got a folder"));
  }
  CHECK(read_file(p, 100) == "old");
  CHECK(t.entries() == 1);
}

TEST_CASE("files: kill -9 in a loop of writes leaves one whole version") {
  const TempFolder t;
  const std::string p = t.file("x", std::string(200000, 'a'));
  for (int round = 0; round < 10; ++round) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (int i = 0;; ++i) write_file_atomic(p, std::string(200000, static_cast<char>('a' + i % 26)));
    }
    ::usleep(3000 + 1700 * round);
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    const std::string got = read_file(p, 200000);
    CHECK(got == std::string(200000, got.at(0)));
  }
}

TEST_CASE("sha256: published vectors, any split") {
  CHECK(sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256_hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  const std::string million(1000000, 'a');
  const std::string want = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
  CHECK(sha256_hex(million) == want);
  const std::size_t splits[] = {1, 63, 64, 65, 997};
  for (const std::size_t piece : splits) {
    Sha256 h;
    for (std::size_t i = 0; i < million.size(); i += piece) h.update(std::string_view(million).substr(i, piece));
    CHECK(h.hex() == want);
    CHECK(h.hex() == sha256_hex(""));  // reset after use
  }
  const TempFolder t;
  CHECK(sha256_file(t.file("m", million)) == want);
}
