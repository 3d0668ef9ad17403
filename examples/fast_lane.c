/* The fast lane by hand: one unix socket, one packet each way, no library at all.
 *
 *     cc -std=c11 -O2 -o fast_lane examples/fast_lane.c
 *     ./fast_lane /run/edged/lease.sock < 64-numbers
 *
 * Reads the 64 pixels of a digit (0 to 16) as text and says which digit it is. docs/protocol.md says what
 * each byte means ("The fast lane", and the example at its end). A real app would take a msgpack library.
 */

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { PACKET_MAX = 65536, PIXELS = 64, DEPTH_MAX = 16 };

/* ---- writing msgpack: short strings, small maps and lists, and the tensor's bytes ------------------- */

typedef struct { uint8_t bytes[PACKET_MAX]; size_t length; } Packet;

static void put(Packet *p, const void *bytes, size_t length) {
    memcpy(p->bytes + p->length, bytes, length);
    p->length += length;
}
static void put_byte(Packet *p, unsigned byte) { p->bytes[p->length++] = (uint8_t)byte; }
static void put_map(Packet *p, unsigned pairs) { put_byte(p, 0x80 | pairs); }
static void put_list(Packet *p, unsigned items) { put_byte(p, 0x90 | items); }
static void put_text(Packet *p, const char *text) { /* up to 31 bytes */
    put_byte(p, 0xa0 | (unsigned)strlen(text));
    put(p, text, strlen(text));
}

static void put_request(Packet *p, const float pixels[PIXELS]) {
    put_map(p, 4);
    put_text(p, "method"), put_text(p, "model_infer");
    put_text(p, "id"), put_byte(p, 1);
    put_text(p, "model_name"), put_text(p, "digits");
    put_text(p, "inputs"), put_list(p, 1);
    put_map(p, 4);
    put_text(p, "name"), put_text(p, "image");
    put_text(p, "datatype"), put_text(p, "FP32");
    put_text(p, "shape"), put_list(p, 2), put_byte(p, 1), put_byte(p, PIXELS);
    put_text(p, "data"), put_byte(p, 0xc5); /* bin 16: its length is big-endian, its content is not */
    put_byte(p, (PIXELS * 4) >> 8), put_byte(p, (PIXELS * 4) & 0xff);
    put(p, pixels, PIXELS * 4);
}

/* ---- reading msgpack: what is at a place, and where the next thing begins --------------------------- */

typedef struct { const uint8_t *at, *end; } Cursor;
typedef enum { VALUE, BYTES, LIST, MAP, BROKEN } Kind;

/* Takes the next thing's head; `count` is its bytes, items or pairs, and a BYTES' or VALUE's content follows. */
static Kind take(Cursor *c, uint64_t *count) {
    static const uint8_t fixed[] = {4, 8, 1, 2, 4, 8, 1, 2, 4, 8}; /* 0xca to 0xd3 */
    *count = 0;
    if (c->at >= c->end) return BROKEN;
    uint8_t head = *c->at++;
    size_t width = 0;
    Kind kind = VALUE;
    if (head <= 0x7f || head >= 0xe0 || head == 0xc0 || head == 0xc2 || head == 0xc3) return VALUE;
    if (head <= 0x8f) return *count = head & 0x0f, MAP;
    if (head <= 0x9f) return *count = head & 0x0f, LIST;
    if (head <= 0xbf) *count = head & 0x1f, kind = BYTES;
    else if (head >= 0xca && head <= 0xd3) *count = fixed[head - 0xca];
    else if (head >= 0xc4 && head <= 0xc6) width = (size_t)1 << (head - 0xc4), kind = BYTES;
    else if (head >= 0xd9 && head <= 0xdb) width = (size_t)1 << (head - 0xd9), kind = BYTES;
    else if (head == 0xdc || head == 0xdd) width = head == 0xdc ? 2 : 4, kind = LIST;
    else if (head == 0xde || head == 0xdf) width = head == 0xde ? 2 : 4, kind = MAP;
    else return BROKEN;
    if ((size_t)(c->end - c->at) < width) return BROKEN;
    while (width--) *count = *count << 8 | *c->at++;
    if ((kind == BYTES || kind == VALUE) && (uint64_t)(c->end - c->at) < *count) return BROKEN;
    return kind;
}

static bool skip(Cursor *c, int depth) {
    uint64_t count;
    Kind kind = take(c, &count);
    if (kind == BROKEN || depth > DEPTH_MAX) return false;
    if (kind == VALUE || kind == BYTES) return c->at += count, true;
    for (uint64_t left = kind == MAP ? 2 * count : count; left; left--)
        if (!skip(c, depth + 1)) return false;
    return true;
}

static bool is(Cursor *c, const char *text) { /* takes a string, and says whether it is this one */
    uint64_t length;
    if (take(c, &length) != BYTES) return false;
    const uint8_t *bytes = c->at;
    c->at += length;
    return length == strlen(text) && memcmp(bytes, text, length) == 0;
}

static bool find(Cursor *map, const char *key) { /* moves to the value of a key of this map */
    uint64_t pairs;
    if (take(map, &pairs) != MAP) return false;
    for (; pairs; pairs--) {
        if (is(map, key)) return true;
        if (!skip(map, 0)) return false;
    }
    return false;
}

static bool find_label(Cursor reply, int64_t *label) {
    uint64_t count;
    if (!find(&reply, "outputs") || take(&reply, &count) != LIST) return false;
    for (; count; count--) {
        Cursor name = reply, data = reply;
        uint64_t length;
        if (find(&name, "name") && is(&name, "label") && find(&data, "data") && take(&data, &length) == BYTES &&
            length == sizeof *label) {
            memcpy(label, data.at, sizeof *label); /* INT64, little-endian, as this machine is */
            return true;
        }
        if (!skip(&reply, 0)) return false;
    }
    return false;
}

int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = argc > 1 ? argv[1] : "/run/edged/lease.sock";
    if (strlen(path) >= sizeof address.sun_path) return fprintf(stderr, "the path is too long\n"), 1;
    strcpy(address.sun_path, path);

    float pixels[PIXELS];
    for (int i = 0; i < PIXELS; i++)
        if (scanf("%f", &pixels[i]) != 1) return fprintf(stderr, "expected %d numbers\n", PIXELS), 1;

    int lane = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct timeval patience = {.tv_sec = 5};
    setsockopt(lane, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(lane, (struct sockaddr *)&address, sizeof address)) return perror(path), 1;

    static Packet request, reply;
    put_request(&request, pixels);
    if (send(lane, request.bytes, request.length, MSG_NOSIGNAL) < 0) return perror("send"), 1;
    ssize_t length = recv(lane, reply.bytes, sizeof reply.bytes, 0);
    if (length <= 0) return fprintf(stderr, "no answer\n"), 1;

    Cursor cursor = {reply.bytes, reply.bytes + length}, error = cursor;
    int64_t label;
    if (find(&error, "error")) {
        uint64_t count;
        if (find(&error, "message") && take(&error, &count) == BYTES)
            fprintf(stderr, "%.*s\n", (int)count, (const char *)error.at);
        return 1;
    }
    if (!find_label(cursor, &label)) return fprintf(stderr, "not an answer\n"), 1;
    printf("reads %" PRId64 "\n", label);
    close(lane);
    return 0;
}
