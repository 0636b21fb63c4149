/* See triple_burn.h for the contract and README.md for how to build it in.
 *
 * Map: text written into a bound · the request · the reply's head · the reply's JSON · one attempt · the functions. */
#include "triple_burn.h"

#include <stdbool.h>
#include <string.h>

/* In _crc32.c, built with -DCRC32_SMALL or -DCRC32_BITWISE. Continues from `crc`, 0 to begin. */
uint32_t crc32_update(uint32_t crc, const void *data, size_t length);

#define HOST_SIZE 64          /* bytes of the server's name, NUL included */
#define KEY_SIZE 16           /* the longest name of a field we read, NUL included; longer names are unknown anyway */
#define MAX_HEAD 16384        /* bytes of a reply's head */
#define NESTED 32             /* levels in a value of an unknown field: one bit each */
#define NO_LENGTH SIZE_MAX    /* the reply ends where the connection does */

/* ---- Text written into a bound ------------------------------------------------------------------------------------ */

/* `length` counts on when `size` is reached: too long is seen afterwards, in one place. */
typedef struct {
    char *at;
    size_t size;
    size_t length;
} writer;

static void put_byte(writer *out, uint32_t byte)
{
    if (out->length < out->size)
        out->at[out->length] = (char)(unsigned char)byte;
    out->length++;
}

static void put(writer *out, const char *text)
{
    while (*text != '\0')
        put_byte(out, (unsigned char)*text++);
}

static void put_number(writer *out, size_t number)
{
    char digits[20];
    size_t count = 0;

    do {
        digits[count++] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    while (count > 0)
        put_byte(out, (unsigned char)digits[--count]);
}

/* End the text with NUL; false when it did not fit. */
static bool closed(writer *out)
{
    put_byte(out, 0);
    return out->length <= out->size;
}

/* ---- The request -------------------------------------------------------------------------------------------------- */

typedef struct {
    int act;
    char pk[TRIPLE_FIELD_SIZE]; /* copies: the caller's may lie in the reply of the request before */
    char did[TRIPLE_FIELD_SIZE];
    size_t did_length;
    const char *server;
    char host[HOST_SIZE];
    uint16_t port;
} question;

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static bool is_printable(const char *text, size_t length, char least)
{
    size_t i;

    for (i = 0; i < length; i++)
        if (text[i] < least || text[i] > '~')
            return false;
    return true;
}

static bool is_host_character(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' || c == '-' || c == '_';
}

/* "host" or "host:port". What passes here can stand in a header. */
static bool read_server(question *ask, const char *server)
{
    size_t i = 0;
    uint32_t port = 0;

    while (i < HOST_SIZE - 1 && is_host_character(server[i])) {
        ask->host[i] = server[i];
        i++;
    }
    ask->host[i] = '\0';
    if (i == 0 || (server[i] != ':' && server[i] != '\0'))
        return false;
    if (server[i] == '\0') {
        ask->port = TRIPLE_PORT;
        return true;
    }
    for (i++; server[i] >= '0' && server[i] <= '9' && port <= UINT16_MAX; i++)
        port = port * 10 + (uint32_t)(server[i] - '0');
    ask->port = (uint16_t)port;
    return server[i] == '\0' && port >= 1 && port <= UINT16_MAX;
}

/* White space around a DeviceID is not part of it. One of nothing else is refused: it stands for a serial number that
 * could not be read, and must not silently cost a certificate. */
static bool read_question(question *ask, int act, const char *pk, const char *did, const char *server)
{
    size_t length = did == NULL ? 0 : strlen(did);
    bool given = length > 0;

    ask->act = act;
    ask->server = server;
    while (length > 0 && is_space(did[length - 1]))
        length--;
    while (length > 0 && is_space(*did)) {
        did++;
        length--;
    }
    ask->did_length = length;
    if (pk == NULL || server == NULL || act < TRIPLE_ACTION_REQUEST || act > TRIPLE_ACTION_BURN_FAILED)
        return false;
    if (length == 0 && (given || act != TRIPLE_ACTION_REQUEST))
        return false;
    if (length >= TRIPLE_FIELD_SIZE || !is_printable(did, length, ' '))
        return false;
    if (length > 0)
        memcpy(ask->did, did, length);
    length = strlen(pk);
    if (length == 0 || length >= TRIPLE_FIELD_SIZE || !is_printable(pk, length, '!'))
        return false;
    memcpy(ask->pk, pk, length + 1);
    return read_server(ask, server);
}

static void put_json_string(writer *out, const char *text, size_t length)
{
    put_byte(out, '"');
    for (; length > 0; length--, text++) {
        if (*text == '"' || *text == '\\')
            put_byte(out, '\\');
        put_byte(out, (unsigned char)*text);
    }
    put_byte(out, '"');
}

static void put_body(writer *out, const question *ask)
{
    put(out, "{\"ProductKey\":");
    put_json_string(out, ask->pk, strlen(ask->pk));
    if (ask->did_length > 0) {
        put(out, ",\"DeviceID\":");
        put_json_string(out, ask->did, ask->did_length);
    }
    put(out, ",\"Action\":");
    put_number(out, (size_t)ask->act);
    put(out, "}");
}

/* HTTP/1.0: a server may then neither send chunks nor an interim reply. */
static void put_request(writer *out, const question *ask)
{
    writer body = {NULL, 0, 0};

    put_body(&body, ask);
    put(out, "POST / HTTP/1.0\r\nHost: ");
    put(out, ask->server);
    put(out, "\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ");
    put_number(out, body.length);
    put(out, "\r\n\r\n");
    put_body(out, ask);
}

/* ---- The reply's head --------------------------------------------------------------------------------------------- */

typedef struct {
    unsigned status; /* 0 before the first line */
    size_t length;   /* of the body, or NO_LENGTH */
    bool whole;
} reply_head;

/* If the line has this name (given in small letters, with its colon), return what follows it, else NULL. */
static const char *header_value(const char *line, const char *end, const char *name)
{
    for (; *name != '\0'; name++, line++) {
        char c = line < end ? *line : '\0';

        if (c >= 'A' && c <= 'Z')
            c = (char)(c + ('a' - 'A'));
        if (c != *name)
            return NULL;
    }
    return line;
}

static bool read_length(const char *at, const char *end, size_t *length)
{
    size_t value = 0;
    const char *digits;

    while (at < end && (*at == ' ' || *at == '\t'))
        at++;
    while (end > at && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    for (digits = at; at < end && *at >= '0' && *at <= '9' && value < SIZE_MAX / 100; at++)
        value = value * 10 + (size_t)(*at - '0');
    if (at == digits || at != end || *length != NO_LENGTH)
        return false;
    *length = value;
    return true;
}

static bool read_status_line(const char *line, size_t length, unsigned *status)
{
    size_t i;

    *status = 0;
    if (length < 12 || memcmp(line, "HTTP/1.", 7) != 0 || (line[7] != '0' && line[7] != '1') || line[8] != ' ')
        return false;
    for (i = 9; i < 12; i++) {
        if (line[i] < '0' || line[i] > '9')
            return false;
        *status = *status * 10 + (unsigned)(line[i] - '0');
    }
    return *status != 0 && (length == 12 || line[12] == ' ');
}

/* One line, without its CR LF. Only what tells where the body ends matters; what could make that doubtful is refused. */
static bool read_line(reply_head *head, const char *line, size_t length)
{
    const char *end = line + length, *value;

    if (head->status == 0)
        return read_status_line(line, length, &head->status);
    if (length == 0) {
        head->whole = true;
        return true;
    }
    if (is_space(*line) || header_value(line, end, "transfer-encoding") != NULL)
        return false;
    if (header_value(line, end, "content-length") == NULL)
        return true;
    value = header_value(line, end, "content-length:");
    return value != NULL && read_length(value, end, &head->length);
}

/* ---- The reply's JSON --------------------------------------------------------------------------------------------- */

typedef struct {
    const char *at;
    const char *end;
} reader;

static int peek(const reader *in)
{
    return in->at < in->end ? (unsigned char)*in->at : -1;
}

static int next(reader *in)
{
    return in->at < in->end ? (unsigned char)*in->at++ : -1;
}

static bool accept(reader *in, int c)
{
    if (peek(in) != c)
        return false;
    in->at++;
    return true;
}

static void skip_space(reader *in)
{
    while (in->at < in->end && is_space(*in->at))
        in->at++;
}

static bool accept_word(reader *in, const char *word)
{
    while (*word != '\0')
        if (next(in) != (unsigned char)*word++)
            return false;
    return true;
}

static bool read_hex(reader *in, unsigned digits, uint32_t *value)
{
    *value = 0;
    for (; digits > 0; digits--) {
        int c = next(in);

        if (c >= '0' && c <= '9')
            c -= '0';
        else if (c >= 'a' && c <= 'f')
            c -= 'a' - 10;
        else if (c >= 'A' && c <= 'F')
            c -= 'A' - 10;
        else
            return false;
        *value = *value << 4 | (uint32_t)c;
    }
    return true;
}

/* What follows a backslash. A character outside of the first 65536 is a pair of surrogates; half a pair is refused. */
static bool read_escape(reader *in, uint32_t *code)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *found;
    uint32_t low;
    int c = next(in);

    if (c != 'u') {
        found = c > 0 ? strchr(names, c) : NULL;
        if (found == NULL)
            return false;
        *code = (unsigned char)values[found - names];
        return true;
    }
    if (!read_hex(in, 4, code))
        return false;
    if (*code < 0xD800 || *code > 0xDFFF)
        return true;
    if (*code > 0xDBFF || !accept(in, '\\') || !accept(in, 'u') || !read_hex(in, 4, &low) || low < 0xDC00 || low > 0xDFFF)
        return false;
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
    return true;
}

/* The rest of a character whose first byte, 80 or more, stands in `code`. */
static bool read_utf8(reader *in, uint32_t *code)
{
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    unsigned more = *code >= 0xF0 ? 3 : *code >= 0xE0 ? 2 : 1, i;

    if (*code < 0xC0 || *code > 0xF4)
        return false;
    *code &= 0x3Fu >> more;
    for (i = 0; i < more; i++) {
        int c = next(in);

        if (c < 0x80 || c > 0xBF)
            return false;
        *code = *code << 6 | ((uint32_t)c & 0x3F);
    }
    return *code >= least[more] && *code <= 0x10FFFF && (*code < 0xD800 || *code > 0xDFFF);
}

/* A string. Too long is for the caller to see in `out`. No field that we read has more than ASCII, so that any other
 * character becomes a NUL, which every reader of a field refuses. */
static bool read_string(reader *in, writer *out)
{
    if (!accept(in, '"'))
        return false;
    for (;;) {
        int c = next(in);
        uint32_t code = (uint32_t)c;

        if (c == '"')
            return true;
        if (c < ' ')
            return false;
        if (c == '\\' ? !read_escape(in, &code) : c >= 0x80 && !read_utf8(in, &code))
            return false;
        put_byte(out, code < 0x80 ? code : 0);
    }
}

static bool skip_string(reader *in)
{
    writer nowhere = {NULL, 0, 0};

    return read_string(in, &nowhere);
}

static bool skip_digits(reader *in)
{
    const char *start = in->at;

    while (in->at < in->end && *in->at >= '0' && *in->at <= '9')
        in->at++;
    return in->at > start;
}

static bool skip_number(reader *in)
{
    accept(in, '-');
    if (!accept(in, '0') && !skip_digits(in))
        return false;
    if (accept(in, '.') && !skip_digits(in))
        return false;
    if (accept(in, 'e') || accept(in, 'E')) {
        if (!accept(in, '+'))
            accept(in, '-');
        return skip_digits(in);
    }
    return true;
}

static bool skip_scalar(reader *in)
{
    switch (peek(in)) {
    case '"':
        return skip_string(in);
    case 't':
        return accept_word(in, "true");
    case 'f':
        return accept_word(in, "false");
    case 'n':
        return accept_word(in, "null");
    default:
        return skip_number(in);
    }
}

static bool skip_name(reader *in)
{
    skip_space(in);
    if (!skip_string(in))
        return false;
    skip_space(in);
    return accept(in, ':');
}

/* Any value, nested ones too, without recursion: `objects` has a bit for each open level, 1 for { and 0 for [. */
static bool skip_value(reader *in)
{
    uint32_t objects = 0;
    unsigned depth = 0;

    for (;;) {
        int c;

        skip_space(in);
        c = peek(in);
        if (c == '{' || c == '[') {
            if (depth == NESTED)
                return false;
            in->at++;
            objects = objects << 1 | (c == '{');
            depth++;
            skip_space(in);
            if (peek(in) != (c == '{' ? '}' : ']')) {
                if (c == '{' && !skip_name(in))
                    return false;
                continue;
            }
        } else if (!skip_scalar(in)) {
            return false;
        }
        for (;;) { /* behind a value: close the levels that end here */
            if (depth == 0)
                return true;
            skip_space(in);
            if (accept(in, ',')) {
                if ((objects & 1) != 0 && !skip_name(in))
                    return false;
                break;
            }
            if (!accept(in, (objects & 1) != 0 ? '}' : ']'))
                return false;
            objects >>= 1;
            depth--;
        }
    }
}

/* What the object told so far. */
typedef struct {
    triple_reply *reply;
    unsigned seen;  /* bit i for FIELDS[i] */
    unsigned given; /* the same, without those that are null */
    bool has_crc;
    uint32_t crc;
} gathered;

static const struct {
    char name[KEY_SIZE];
    size_t offset;
    size_t size; /* 0: the checksum, which is no text in the reply */
} FIELDS[] = {
    {"CRC32", 0, 0},
    {"ProductKey", offsetof(triple_reply, product_key), TRIPLE_FIELD_SIZE},
    {"DeviceName", offsetof(triple_reply, device_name), TRIPLE_NAME_SIZE},
    {"DeviceSecret", offsetof(triple_reply, device_secret), TRIPLE_FIELD_SIZE},
    {"ProductSecret", offsetof(triple_reply, product_secret), TRIPLE_FIELD_SIZE},
    {"ProductID", offsetof(triple_reply, product_id), TRIPLE_FIELD_SIZE},
    {"DeviceID", offsetof(triple_reply, device_id), TRIPLE_FIELD_SIZE},
    {"Status", offsetof(triple_reply, status), TRIPLE_STATUS_SIZE},
};
#define FIELD_COUNT (sizeof FIELDS / sizeof FIELDS[0])
#define HAS_CRC (1u << 0)
#define HAS_NAME (1u << 2)
#define HAS_SECRET (1u << 3)
#define HAS_PRODUCT_SECRET (1u << 4)

/* The checksum: up to 8 hex digits in a string, or the unsigned number. */
static bool read_crc(reader *in, uint32_t *crc)
{
    char text[9];
    writer out = {text, sizeof text, 0};
    const char *start = in->at;
    uint64_t number = 0;

    if (peek(in) == '"') {
        reader digits = {text, text};

        if (!read_string(in, &out) || !closed(&out))
            return false;
        digits.end += out.length - 1;
        return out.length > 1 && read_hex(&digits, (unsigned)(out.length - 1), crc);
    }
    if (!skip_number(in) || in->at - start > 10)
        return false;
    for (; start < in->at; start++) {
        if (*start < '0' || *start > '9')
            return false;
        number = number * 10 + (uint64_t)(*start - '0');
    }
    *crc = (uint32_t)number;
    return number <= UINT32_MAX;
}

/* One value of a field we know; null counts as absent, and so does what is no checksum. */
static bool read_field(reader *in, size_t field, gathered *all)
{
    char *text = (char *)all->reply + FIELDS[field].offset;
    writer out = {text, FIELDS[field].size, 0};
    reader crc = *in;

    if ((all->seen & 1u << field) != 0)
        return false;
    all->seen |= 1u << field;
    if (peek(in) == 'n')
        return accept_word(in, "null");
    all->given |= 1u << field;
    if (FIELDS[field].size == 0) {
        all->has_crc = read_crc(&crc, &all->crc);
        return skip_value(in);
    }
    return read_string(in, &out) && closed(&out) && is_printable(text, out.length - 1, ' ');
}

static bool read_member(reader *in, gathered *all)
{
    char name[KEY_SIZE];
    writer out = {name, sizeof name, 0};
    size_t field = FIELD_COUNT;

    skip_space(in);
    if (!read_string(in, &out))
        return false;
    skip_space(in);
    if (!accept(in, ':'))
        return false;
    skip_space(in);
    if (closed(&out))
        for (field = 0; field < FIELD_COUNT; field++)
            if (strlen(FIELDS[field].name) + 1 == out.length && memcmp(FIELDS[field].name, name, out.length) == 0)
                break;
    return field < FIELD_COUNT ? read_field(in, field, all) : skip_value(in);
}

static bool read_object(reader *in, gathered *all)
{
    skip_space(in);
    if (!accept(in, '{'))
        return false;
    skip_space(in);
    if (!accept(in, '}')) {
        do {
            if (!read_member(in, all))
                return false;
            skip_space(in);
        } while (accept(in, ','));
        if (!accept(in, '}'))
            return false;
    }
    skip_space(in);
    return in->at == in->end;
}

static uint32_t add_crc(uint32_t crc, const char *text)
{
    return crc32_update(crc, text, strlen(text));
}

/* The order is that of the vendor's reference code and of the server. */
static uint32_t reply_crc(const triple_reply *reply)
{
    uint32_t crc = add_crc(0, reply->product_key);

    crc = add_crc(crc, reply->device_name);
    crc = add_crc(crc, reply->device_secret);
    crc = add_crc(crc, reply->product_secret);
    return add_crc(crc, reply->product_id);
}

static int judge(const gathered *all)
{
    triple_reply *reply = all->reply;

    if (reply->status[0] == '\0')
        return TRIPLE_REPLY;
    if (strcmp(reply->status, "OK") != 0)
        return TRIPLE_REFUSED;
    if ((all->given & (HAS_CRC | HAS_NAME | HAS_SECRET)) == 0)
        return TRIPLE_OK;
    if (reply->product_key[0] == '\0' || reply->device_name[0] == '\0' || reply->device_secret[0] == '\0' ||
        (all->given & HAS_PRODUCT_SECRET) == 0)
        return TRIPLE_REPLY;
    reply->has_certificate = 1;
    return all->has_crc && reply_crc(reply) == all->crc ? TRIPLE_OK : TRIPLE_CRC;
}

int triple_parse(const char *json, size_t length, triple_reply *reply)
{
    reader in = {json, json + length};
    gathered all = {reply, 0, 0, false, 0};
    int result = TRIPLE_REPLY;
    char status[TRIPLE_STATUS_SIZE];

    memset(reply, 0, sizeof *reply);
    if (read_object(&in, &all))
        result = judge(&all);
    if (result != TRIPLE_OK) {
        memcpy(status, reply->status, sizeof status);
        memset(reply, 0, sizeof *reply);
        if (result == TRIPLE_REFUSED)
            memcpy(reply->status, status, sizeof status);
    }
    return result;
}

/* ---- One attempt -------------------------------------------------------------------------------------------------- */

typedef struct {
    const question *ask;
    char *buffer;
    size_t size;
    triple_reply *reply;
    uint64_t deadline;
    unsigned status; /* HTTP's, 0 before it came */
    bool sent;       /* the server may know of the request */
} attempt;

/* A clock that went back, as one of 32 bits does after 49 days, ends the wait too: no deadline is that far away. One
 * that was set right by some seconds does not: the reply to a device without DeviceID is worth a certificate. */
static uint32_t time_left(uint64_t deadline)
{
    uint64_t left = deadline - HAL_UptimeMs();

    if (left > TRIPLE_TOTAL_MS)
        return left / 2 > TRIPLE_TOTAL_MS ? 0 : TRIPLE_TOTAL_MS;
    return (uint32_t)left;
}

static int from_hal(int code)
{
    return code == HAL_TRIPLE_TIMEOUT ? TRIPLE_TIMEOUT : TRIPLE_NETWORK;
}

static int send_all(int socket, attempt *this)
{
    writer out = {this->buffer, this->size, 0};
    size_t done = 0;

    put_request(&out, this->ask);
    if (out.length > out.size)
        return TRIPLE_BUFFER;
    this->sent = true;
    while (done < out.length) {
        uint32_t left = time_left(this->deadline);
        int taken = left == 0 ? HAL_TRIPLE_TIMEOUT
                              : HAL_Triple_Send(socket, this->buffer + done, out.length - done, left);

        if (taken <= 0)
            return from_hal(taken);
        done += (size_t)taken;
    }
    return TRIPLE_OK;
}

/* Take the whole lines of the head off the buffer's start. The buffer holds `have` bytes. */
static bool take_head(reply_head *head, char *buffer, size_t *have)
{
    char *end;

    while (!head->whole && (end = memchr(buffer, '\n', *have)) != NULL) {
        size_t line = (size_t)(end - buffer);

        if (line == 0 || buffer[line - 1] != '\r' || !read_line(head, buffer, line - 1))
            return false;
        *have -= line + 1;
        memmove(buffer, end + 1, *have);
    }
    return true;
}

/* Receive one reply. Its body then stands in the buffer, `length` bytes and a NUL; the head never needs more room than
 * its longest line. */
static int receive(int socket, attempt *this, size_t *length)
{
    reply_head head = {0, NO_LENGTH, false};
    size_t have = 0, room = this->size - 1, total = 0;
    uint32_t left;
    int got;

    for (;;) {
        left = time_left(this->deadline);
        got = left == 0 ? HAL_TRIPLE_TIMEOUT : HAL_Triple_Recv(socket, this->buffer + have, room - have, left);
        if (got < 0)
            return from_hal(got);
        if (got == 0) { /* which is how a body without a length ends */
            if (!head.whole || head.length != NO_LENGTH)
                return TRIPLE_NETWORK;
            break;
        }
        have += (size_t)got;
        total += (size_t)got;
        if (!take_head(&head, this->buffer, &have) || (!head.whole && total > MAX_HEAD))
            return TRIPLE_HTTP;
        this->status = head.status;
        if (head.whole && have >= head.length) {
            have = head.length;
            break;
        }
        if (have == room)
            return head.whole ? TRIPLE_BUFFER : TRIPLE_HTTP;
    }
    this->buffer[have] = '\0';
    *length = have;
    return TRIPLE_OK;
}

static bool is_about_us(const question *ask, const triple_reply *reply)
{
    if (reply->product_key[0] != '\0' && strcmp(reply->product_key, ask->pk) != 0)
        return false;
    return reply->device_id[0] == '\0' || ask->did_length == 0 ||
           (strlen(reply->device_id) == ask->did_length && memcmp(reply->device_id, ask->did, ask->did_length) == 0);
}

static int check_reply(attempt *this, size_t length)
{
    int result = triple_parse(this->buffer, length, this->reply);

    if (this->status != 200)
        return result == TRIPLE_REFUSED ? TRIPLE_REFUSED : TRIPLE_HTTP;
    if (result != TRIPLE_OK)
        return result;
    if (!is_about_us(this->ask, this->reply))
        return TRIPLE_MISMATCH;
    return this->reply->has_certificate == (this->ask->act == TRIPLE_ACTION_REQUEST) ? TRIPLE_OK : TRIPLE_REPLY;
}

static int run(attempt *this)
{
    size_t length = 0;
    uint32_t left = time_left(this->deadline);
    int socket = left == 0 ? HAL_TRIPLE_TIMEOUT : HAL_Triple_Connect(this->ask->host, this->ask->port, left);
    int result;

    this->status = 0;
    if (socket < 0)
        return from_hal(socket);
    result = send_all(socket, this);
    if (result == TRIPLE_OK)
        result = receive(socket, this, &length);
    HAL_Triple_Close(socket);
    return result == TRIPLE_OK ? check_reply(this, length) : result;
}

static bool may_pass(const attempt *this, int result)
{
    switch (result) {
    case TRIPLE_NETWORK:
    case TRIPLE_TIMEOUT:
    case TRIPLE_HTTP:
    case TRIPLE_REPLY:
    case TRIPLE_CRC:
        return true;
    case TRIPLE_REFUSED: /* 503: the store's disk, or a restart under way */
        return this->status == 408 || this->status >= 500;
    default:
        return false;
    }
}

static void log_failure(const attempt *this, int result)
{
    char line[160];
    writer out = {line, sizeof line - 1, 0};

    put(&out, "triple: ");
    put(&out, triple_error(result));
    if (this->status != 0) {
        put(&out, " HTTP ");
        put_number(&out, this->status);
    }
    if (this->reply->status[0] != '\0') {
        put(&out, " ");
        put(&out, this->reply->status);
    }
    line[out.length < out.size ? out.length : out.size] = '\0';
    HAL_Triple_Log(line);
}

/* ---- The functions ------------------------------------------------------------------------------------------------ */

int triple_request(int act, const char *pk, const char *did, const char *server, char *buffer, size_t size,
                   triple_reply *reply)
{
    question ask;
    attempt this = {&ask, buffer, size, reply, 0, 0, false};
    uint64_t end = HAL_UptimeMs() + TRIPLE_TOTAL_MS;
    uint32_t pause = TRIPLE_PAUSE_MS;
    unsigned count;
    int result = TRIPLE_ARGUMENT;
    bool valid = reply != NULL && buffer != NULL && size > 0 && read_question(&ask, act, pk, did, server);

    if (reply == NULL)
        return TRIPLE_ARGUMENT;
    memset(reply, 0, sizeof *reply);
    if (!valid) {
        log_failure(&this, result);
        return result;
    }
    for (count = 1;; count++) {
        this.deadline = HAL_UptimeMs() + TRIPLE_ATTEMPT_MS;
        if (this.deadline > end || ask.did_length == 0) /* a lost reply to one without DeviceID costs a certificate */
            this.deadline = end;
        result = run(&this);
        if (result == TRIPLE_OK)
            return result;
        if (result != TRIPLE_REFUSED)
            memset(reply, 0, sizeof *reply);
        log_failure(&this, result);
        if (count == TRIPLE_ATTEMPTS || !may_pass(&this, result) || (this.sent && ask.did_length == 0))
            return result;
        if (time_left(end) <= pause)
            return result;
        HAL_SleepMs(pause);
        pause *= 2;
    }
}

/* The text comes first, so that its address is the block's: the parsed reply behind it spares the caller's stack. */
typedef struct {
    char text[TRIPLE_BUFFER_SIZE];
    triple_reply reply;
} heap_block;

char *send_req(int act, char *pk, char *did, const char *server_ip)
{
    heap_block *block = HAL_Malloc(sizeof *block);

    if (block == NULL) {
        HAL_Triple_Log(triple_error(TRIPLE_MEMORY));
        return NULL;
    }
    if (triple_request(act, pk, did, server_ip, block->text, sizeof block->text, &block->reply) != TRIPLE_OK) {
        HAL_Free(block);
        return NULL;
    }
    return block->text;
}

int triple_parse_data(const char *data, char *pk, size_t pk_size, char *dn, size_t dn_size, char *ps, size_t ps_size,
                      char *ds, size_t ds_size, char *did, size_t did_size)
{
    triple_reply reply;
    const struct {
        const char *value;
        char *buffer;
        size_t size;
    } outputs[] = {
        {reply.product_key, pk, pk_size},       {reply.device_name, dn, dn_size}, {reply.product_secret, ps, ps_size},
        {reply.device_secret, ds, ds_size}, {reply.device_id, did, did_size},
    };
    size_t i;
    int result;

    if (data == NULL)
        return TRIPLE_ARGUMENT;
    result = triple_parse(data, strlen(data), &reply);
    if (result != TRIPLE_OK)
        return result;
    if (!reply.has_certificate)
        return TRIPLE_REPLY;
    for (i = 0; i < sizeof outputs / sizeof outputs[0]; i++)
        if (outputs[i].buffer != NULL && strlen(outputs[i].value) >= outputs[i].size)
            return TRIPLE_BUFFER;
    for (i = 0; i < sizeof outputs / sizeof outputs[0]; i++)
        if (outputs[i].buffer != NULL)
            memcpy(outputs[i].buffer, outputs[i].value, strlen(outputs[i].value) + 1);
    return TRIPLE_OK;
}

/* For a caller without the header's macro: the header's own sizes. */
int(parse_data)(const char *data, char *pk, char *dn, char *ps, char *ds, char *did)
{
    return triple_parse_data(data, pk, TRIPLE_FIELD_SIZE, dn, TRIPLE_NAME_SIZE, ps, TRIPLE_FIELD_SIZE, ds,
                             TRIPLE_FIELD_SIZE, did, TRIPLE_FIELD_SIZE);
}

const char *triple_error(int result)
{
    switch (result) {
    case TRIPLE_OK:
        return "Done.";
    case TRIPLE_ARGUMENT:
        return "Bad argument: check action, ProductKey, DeviceID and server address.";
    case TRIPLE_BUFFER:
        return "The buffer is too small: is this a certtool server?";
    case TRIPLE_MEMORY:
        return "Out of memory.";
    case TRIPLE_NETWORK:
        return "No connection to the server, or it broke.";
    case TRIPLE_TIMEOUT:
        return "The server did not answer in time.";
    case TRIPLE_HTTP:
        return "Not the answer of a certtool server: check its address.";
    case TRIPLE_REPLY:
        return "The reply breaks the protocol.";
    case TRIPLE_REFUSED:
        return "The server refused.";
    case TRIPLE_CRC:
        return "The checksum is wrong: do not burn this certificate.";
    case TRIPLE_MISMATCH:
        return "The reply is about another device or product.";
    default:
        return "Unknown result.";
    }
}
